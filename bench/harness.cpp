#include "harness.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "moecore/threads.hpp"

namespace moecore::bench {

double now_us() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::micro>(now).count();
}

Options parse_options(int argc, char** argv, std::vector<int64_t> default_tokens,
                      const char* own_options) {
    Options options;
    options.tokens = std::move(default_tokens);
    const std::string usage = std::string("usage: ") + argv[0] +
                              " [--json] [--threads N] [--tokens T,T,...] [--shape NAME] "
                              "[--repeats N] [--device cpu|cuda] [--skewed] [--help]" +
                              own_options;
    const auto fail = [&](const std::string& what) {
        std::fprintf(stderr, "%s: %s\n%s\n", argv[0], what.c_str(), usage.c_str());
        std::exit(2);
    };
    const auto positive = [&](const std::string& flag, const std::string& value) {
        const int number = std::atoi(value.c_str());
        if (number < 1) fail(flag + " must be a number >= 1, got " + value);
        return number;
    };
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        if (flag == "--help") {
            std::printf("%s\n", usage.c_str());
            std::exit(0);
        }
        if (flag == "--json" || flag == "--skewed") {
            (flag == "--json" ? options.json : options.skewed) = true;
            continue;
        }
        if (i + 1 == argc) fail("unknown option, or one without its value: " + flag);
        const std::string value = argv[++i];
        if (flag == "--threads") {
            set_num_threads(positive(flag, value));
        } else if (flag == "--repeats") {
            options.repeats = positive(flag, value);
        } else if (flag == "--device") {
            if (value != "cpu" && value != "cuda") fail("--device must be cpu or cuda: " + value);
            options.cuda = value == "cuda";
        } else if (flag == "--shape") {
            options.shape = value;
        } else if (flag == "--tokens") {
            options.tokens.clear();
            for (const char* p = value.c_str(); *p != '\0';) {
                char* end = nullptr;
                const int64_t tokens = std::strtoll(p, &end, 10);
                if (end == p || tokens < 1) fail("--tokens must be positive numbers: " + value);
                options.tokens.push_back(tokens);
                p = *end == ',' ? end + 1 : end;
            }
        } else {
            fail("unknown option " + flag);
        }
    }
    return options;
}

const std::vector<LayerShape>& layer_shapes() {
    static const std::vector<LayerShape> shapes = {
        {"small-many", 1024, 512, 32, 8},  // a Qwen3-MoE in small
        {"small-few", 1024, 2048, 8, 2},   // a Mixtral in small
        {"qwen3-30b-a3b", 2048, 768, 128, 8},
        {"mixtral-8x7b/2", 4096, 14336, 4, 2},  // 4 of its 8 experts
        {"deepseek-v3/16", 7168, 2048, 16, 8},  // 16 of its 256 experts
        {"gpt-oss-20b", 2880, 2880, 32, 4},
    };
    return shapes;
}

const std::vector<LayerShape>& gpu_layer_shapes() {
    static const std::vector<LayerShape> shapes = {
        {"mixtral-8x7b", 4096, 14336, 8, 2},
        {"qwen3-30b-a3b", 2048, 768, 128, 8},
        {"deepseek-v3/8", 7168, 2048, 32, 8},  // 32 experts, top-8 of them
        {"gpt-oss-20b", 2880, 2880, 32, 4},
    };
    return shapes;
}

OwnedTensor random_logits(int64_t num_tokens, int64_t num_experts, bool skewed, uint64_t seed) {
    OwnedTensor logits = random_tensor(DType::kFloat32, {num_tokens, num_experts}, 1.0f, seed);
    for (int64_t i = 0; skewed && i < logits.view.num_elements(); ++i)
        logits.view.as<float>()[i] -= std::log(1.0f + static_cast<float>(i % num_experts));
    return logits;
}

OwnedTensor empty_tensor(DType dtype, std::initializer_list<int64_t> shape) {
    size_t bytes = size_of(dtype);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    OwnedTensor tensor{Buffer({}, bytes), {}};
    tensor.view = TensorView(tensor.buffer.data(), dtype, shape);
    return tensor;
}

OwnedTensor random_tensor(DType dtype, std::initializer_list<int64_t> shape, float scale,
                          uint64_t seed) {
    OwnedTensor tensor = empty_tensor(dtype, shape);
    // Sums of four bytes of a xorshift: close enough to normal, and fast for gigabytes.
    uint64_t state = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
    const auto next = [&] {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        int sum = -510;
        for (int i = 0; i < 4; ++i) sum += static_cast<int>(state >> (8 * i) & 0xff);
        return static_cast<float>(sum) * (scale / 147.8f);
    };
    const int64_t count = tensor.view.num_elements();
    for (int64_t i = 0; i < count; ++i) {
        const float value = next();
        if (dtype == DType::kFloat32) {
            tensor.view.as<float>()[i] = value;
        } else {
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            tensor.view.as<uint16_t>()[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
        }
    }
    return tensor;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values.empty() ? 0 : values[values.size() / 2];
}

Sample measure(int repeats, BandwidthProbe& probe, const std::function<void(int)>& fn) {
    std::vector<double> times, bandwidths;
    fn(0);
    for (int i = 1; static_cast<int>(times.size()) < repeats; ++i) {
        const double before = probe.read_gbps();
        const double begin = now_us();
        fn(i);
        const double us = now_us() - begin;
        const double after = probe.read_gbps();
        const bool moved = std::abs(before - after) > 0.1 * std::min(before, after);
        if (moved && i < 3 * repeats) continue;
        times.push_back(us);
        bandwidths.push_back((before + after) / 2);
    }
    Sample sample;
    sample.time_us = median(times);
    std::sort(times.begin(), times.end());
    sample.spread = (times[times.size() * 3 / 4] - times[times.size() / 4]) / sample.time_us;
    sample.read_gbps = median(bandwidths);
    return sample;
}

std::string format(double value, int digits) {
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return text;
}

Report::Report(bool json, std::vector<std::string> columns)
    : json_(json), columns_(std::move(columns)) {
    if (!json_) row(columns_);
}

void Report::row(const std::vector<std::string>& values) {
    std::string line = json_ ? "{" : "";
    for (size_t i = 0; i < values.size(); ++i) {
        if (json_) {
            char* end = nullptr;
            std::strtod(values[i].c_str(), &end);
            const bool is_number = !values[i].empty() && *end == '\0';
            const char* quote = is_number ? "" : "\"";
            line += (i ? ", \"" : "\"") + columns_[i] + "\": " + quote + values[i] + quote;
        } else {
            const int width = i == 0 ? -18 : std::max<int>(9, static_cast<int>(columns_[i].size()));
            char cell[96];
            std::snprintf(cell, sizeof cell, "%s%*s", i ? "  " : "", width, values[i].c_str());
            line += cell;
        }
    }
    std::printf("%s%s\n", line.c_str(), json_ ? "}" : "");
    std::fflush(stdout);
}

void Report::note(const std::string& text) const {
    if (!json_) std::printf("# %s\n", text.c_str());
}

}  // namespace moecore::bench
