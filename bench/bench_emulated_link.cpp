// What overlap hides of a link: one rank of a group runs one MoE layer alone, its peers emulated.
//
//   link     a transfer takes --link's microseconds plus its bytes over its GB/s. Emulation: these
//            are no measurements of NVLink or of NCCL
//   full     the layer of rank 0, with rows that arrive at that pace, from the end of its plan on
//   echo     the same, rows in place, no transfer
//   exposed  full - echo; share = exposed / full
//   serial   full of one group: dispatch, experts, return, one after another
//   plan     what precedes it: who sends what where, the same in full and echo
//
// T tokens on every rank, routed at random. All ranks have run the layer once, so that what arrives
// is what the peers sent. What hosts tell each other is replayed and takes no time. correct: rank
// 0's output has the bits of a layer with all experts.

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>

#include "emulated_link.hpp"
#include "harness.hpp"
#include "moecore/expert_parallel.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/memory.hpp"

namespace moecore::bench {
namespace {

struct Shape {
    const char* name;
    int64_t hidden, inner, shared;
    int experts, top_k;
};
constexpr std::array kShapes = {
    Shape{"small-many", 1024, 512, 0, 32, 8},
    Shape{"qwen3-30b-a3b", 2048, 768, 0, 128, 8},
    Shape{"deepseek-v3", 7168, 2048, 2048, 256, 8},
    Shape{"deepseek-v3 without its shared expert", 7168, 2048, 0, 256, 8},
};

/// Random tensors of one device, and what they hold.
class Memory {
public:
    explicit Memory(bool is_cuda) {
        if (is_cuda) gpu_ = std::make_unique<Gpu>();
    }
    Device device() const { return gpu_ == nullptr ? Device{} : Gpu::device(); }
    OwnedTensor random(DType dtype, std::initializer_list<int64_t> shape, float scale,
                       uint64_t seed) {
        return gpu_ == nullptr ? random_tensor(dtype, shape, scale, seed)
                               : gpu_->random(dtype, shape, scale, seed);
    }
    std::vector<char> bytes(const TensorView& view) {
        std::vector<char> result(static_cast<size_t>(view.num_elements()) * size_of(view.dtype));
        if (gpu_ == nullptr)
            std::memcpy(result.data(), view.data, result.size());
        else
            gpu_->download(result.data(), view);
        return result;
    }

private:
    std::unique_ptr<Gpu> gpu_;
};

/// All experts, and a view of any rank's.
class Experts {
public:
    Experts(const Shape& shape, Memory& memory) : shape_(shape) {
        const int64_t h = shape.hidden, i = shape.inner, s = shape.shared, e = shape.experts;
        gate_up_ = memory.random(DType::kBFloat16, {e, 2 * i, h}, 0.02f, 1);
        down_ = memory.random(DType::kBFloat16, {e, h, i}, 0.02f, 2);
        if (s == 0) return;
        shared_gate_up_ = memory.random(DType::kBFloat16, {2 * s, h}, 0.02f, 3);
        shared_down_ = memory.random(DType::kBFloat16, {h, s}, 0.02f, 4);
    }

    MoEConfig config(ExpertRange range) const {
        MoEConfig config;
        config.hidden_size = shape_.hidden;
        config.intermediate_size = shape_.inner;
        config.num_experts = shape_.experts;
        config.first_expert = range.first;
        config.num_local_experts = range.count;
        config.routing = {.top_k = shape_.top_k};
        config.activation.activation = Activation::kSwiglu;
        config.shared_intermediate_size = shape_.shared;
        return config;
    }
    MoEWeights weights(ExpertRange range) const {
        MoEWeights weights;
        weights.gate_up = share(gate_up_.view, range);
        weights.down = share(down_.view, range);
        weights.shared_gate_up = shared_gate_up_.view;
        weights.shared_down = shared_down_.view;
        return weights;
    }

private:
    static TensorView share(const TensorView& all, ExpertRange range) {
        TensorView part = all;
        part.shape[0] = range.count;
        part.data = all.as<char>() +
                    range.first * all.strides[0] * static_cast<int64_t>(size_of(all.dtype));
        return part;
    }

    const Shape& shape_;
    OwnedTensor gate_up_, down_, shared_gate_up_, shared_down_;
};

/// One rank's tokens, their routing and their place.
struct Tokens {
    OwnedTensor hidden, logits, output;

    Tokens(const Shape& shape, int64_t count, uint64_t seed, Memory& memory)
        : hidden(memory.random(DType::kBFloat16, {count, shape.hidden}, 1.0f, seed)),
          logits(memory.random(DType::kFloat32, {count, shape.experts}, 1.0f, seed + 7)),
          output(memory.random(DType::kBFloat16, {count, shape.hidden}, 1.0f, seed + 8)) {}

    void run(const MoELayer& layer, Workspace& workspace, Stream stream) const {
        workspace.grow(layer.workspace_bytes(hidden.view.shape[0]));
        layer.forward(hidden.view, logits.view, output.view, workspace, stream);
    }
};

/// A stream of its own on a GPU; on the CPU none.
class OwnStream {
public:
    explicit OwnStream(Device device) {
        if (device.type == DeviceType::kCuda) owned_.emplace(device.index);
    }
    Stream get() const { return owned_ ? owned_->get() : Stream{}; }

private:
    std::optional<cuda::OwnedStream> owned_;
};

struct LinkOptions {
    int ranks = 8;
    Link link{370.0, 5.0, 0};
    std::vector<int> groups{1, 2, 4};
};

/// Figures of one number of groups, in microseconds.
struct Figures {
    double full = 0, echo = 0, plan = 0;
    bool is_right = false;
    std::string phases;
};

struct Span {
    double begin_us = 0, end_us = 0;
};

/// Of the trace event with that name.
Span find_span(const std::string& events, const std::string& name) {
    const size_t event = events.find("\"name\":\"" + name + "\"");
    const size_t times = events.find("\"ts\":", event);
    double begin = 0, duration = 0;
    if (event == std::string::npos || times == std::string::npos ||
        std::sscanf(events.c_str() + times, "\"ts\":%lf,\"dur\":%lf", &begin, &duration) != 2)
        throw std::runtime_error("a layer must have the phase " + name + ", got " + events);
    return {begin, begin + duration};
}

class Bench {
public:
    Bench(const Shape& shape, const Options& options, const LinkOptions& link)
        : shape_(shape),
          options_(options),
          link_(link),
          memory_(options.cuda),
          experts_(shape, memory_) {}

    void run(int64_t num_tokens, Report& report) {
        std::vector<Tokens> tokens;
        for (int r = 0; r < link_.ranks; ++r)
            tokens.emplace_back(shape_, num_tokens, 100 + 10 * static_cast<uint64_t>(r), memory_);
        const std::vector<char> wanted = run_whole(tokens[0]);
        double serial = 0;
        for (const int groups : link_.groups) {
            const Figures figures = run_groups(groups, tokens, wanted);
            if (groups == 1) serial = figures.full;
            const double exposed = figures.full - figures.echo;
            report.row({shape_.name, std::to_string(link_.ranks), std::to_string(num_tokens),
                        std::to_string(groups), format(figures.full, 0), format(figures.echo, 0),
                        format(exposed, 0), format(exposed / figures.full, 3), format(serial, 0),
                        format(figures.plan, 0), figures.is_right ? "yes" : "NO"});
            report.note("  a full one, us: " + figures.phases);
        }
    }

private:
    std::vector<char> run_whole(const Tokens& tokens) {
        const ExpertRange all{0, shape_.experts};
        const MoELayer layer(experts_.config(all), experts_.weights(all));
        Workspace workspace(memory_.device(), 0);
        const OwnStream stream(memory_.device());
        tokens.run(layer, workspace, stream.get());
        make_loopback_transport(memory_.device())->synchronize("whole", stream.get());
        return memory_.bytes(tokens.output.view);
    }

    Figures run_groups(int groups, const std::vector<Tokens>& tokens,
                       const std::vector<char>& wanted) {
        auto transports = make_in_process_transports(link_.ranks, memory_.device());
        std::vector<std::string> errors(transports.size());
        std::vector<std::thread> threads;
        Figures figures;
        for (size_t r = 0; r < transports.size(); ++r)
            threads.emplace_back([&, r] {
                try {
                    std::optional<cuda::DeviceScope> current;
                    if (options_.cuda) current.emplace(Gpu::device().index);
                    run_rank(*transports[r], groups, tokens[r], r == 0 ? &figures : nullptr);
                } catch (const std::exception& error) {
                    transports[r]->abort(error.what());
                    errors[r] = error.what();
                }
            });
        for (std::thread& thread : threads) thread.join();
        for (const std::string& error : errors)
            if (!error.empty()) throw std::runtime_error(error);
        figures.is_right = memory_.bytes(tokens[0].output.view) == wanted;
        return figures;
    }

    /// `figures`: of the rank that goes on alone.
    void run_rank(Transport& transport, int groups, const Tokens& tokens, Figures* figures) {
        EmulatedLink link(transport, link_.link);
        ExpertParallel ranks(figures != nullptr ? static_cast<Transport&>(link) : transport);
        const ExpertRange range = expert_range(shape_.experts, transport.rank(), transport.size());
        const MoELayer layer(experts_.config(range), experts_.weights(range), ranks,
                             {.schedule = Schedule::kAllToAll, .num_groups = groups});
        Workspace workspace(transport.device(), 0);
        const OwnStream stream(transport.device());
        for (int i = 0; i < 2; ++i) {
            link.begin(EmulatedLink::Mode::kRecord);
            tokens.run(layer, workspace, stream.get());
            transport.synchronize("record", stream.get());
        }
        transport.barrier("recorded");  // the GPU is rank 0's from now on
        if (figures == nullptr) return;
        const auto time = [&](EmulatedLink::Mode mode) {
            link.begin(mode);
            ranks.start_trace();
            tokens.run(layer, workspace, stream.get());
            transport.synchronize("alone", stream.get());
            const std::string events = ranks.trace_events();
            const Span plan = find_span(events, "plan");
            figures->plan = plan.end_us - plan.begin_us;
            return find_span(events, "combine").end_us - plan.end_us;
        };
        std::vector<double> full, echo;
        for (int i = 0; i < options_.repeats + 2; ++i) {
            const double times[] = {time(EmulatedLink::Mode::kEcho),
                                    time(EmulatedLink::Mode::kLink)};
            if (i < 2) continue;
            echo.push_back(times[0]);
            full.push_back(times[1]);
        }
        figures->echo = median(echo);
        figures->full = median(full);
        for (const PhaseTime& phase : ranks.phase_times())
            figures->phases += (figures->phases.empty() ? "" : ", ") + phase.name + " " +
                               format(phase.total_us, 0);
    }

    const Shape& shape_;
    const Options& options_;
    const LinkOptions& link_;
    Memory memory_;
    Experts experts_;
};

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(2);
}

/// --ep N, --link GB/s,us[,blocks], --groups G,G,...; taken out of argv.
LinkOptions take_link_options(int& argc, char** argv) {
    LinkOptions options;
    int kept = 1;
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        if (flag != "--ep" && flag != "--link" && flag != "--groups") {
            argv[kept++] = argv[i];
            continue;
        }
        if (++i == argc) fail(flag + " must have a value");
        const char* value = argv[i];
        if (flag == "--ep") options.ranks = std::atoi(value);
        Link& link = options.link;
        if (flag == "--link" &&
            std::sscanf(value, "%lf,%lf,%d", &link.gbps, &link.us, &link.blocks) < 2)
            fail(std::string("--link must be GB/s,us or GB/s,us,blocks, got ") + value);
        if (flag == "--groups") {
            options.groups.clear();
            for (const char* p = value; *p != '\0'; p += *p == ',' ? 1 : 0)
                options.groups.push_back(
                    static_cast<int>(std::strtol(p, const_cast<char**>(&p), 10)));
        }
    }
    argc = kept;
    if (options.ranks < 1) fail("--ep must be >= 1");
    if (!(options.link.gbps > 0) || options.link.us < 0 || options.link.blocks < 0)
        fail("--link must have GB/s > 0, us >= 0, blocks >= 0");
    for (const int groups : options.groups)
        if (groups < 1 || groups > 64) fail("--groups must be numbers in [1, 64]");
    return options;
}

}  // namespace
}  // namespace moecore::bench

int main(int argc, char** argv) {
    using namespace moecore::bench;
    const LinkOptions link = take_link_options(argc, argv);
    const Options options =
        parse_options(argc, argv, {4096}, " [--ep N] [--link GB/s,us[,blocks]] [--groups G,G,...]");
    const std::string wanted = options.shape.empty() ? "small-many" : options.shape;
    const auto shape = std::find_if(kShapes.begin(), kShapes.end(),
                                    [&](const Shape& s) { return wanted == s.name; });
    if (shape == kShapes.end()) fail("--shape must be a known layer, got " + wanted);
    try {
        Bench bench(*shape, options, link);
        Report report(options.json, {"shape", "ranks", "T", "groups", "full_us", "echo_us",
                                     "exposed_us", "share", "serial_us", "plan_us", "correct"});
        report.note("emulated link, no measurement of one: " + format(link.link.gbps, 1) +
                    " GB/s, " + format(link.link.us, 0) + " us, " +
                    (link.link.blocks == 0 ? "copy engines"
                                           : std::to_string(link.link.blocks) + " blocks"));
        for (const int64_t tokens : options.tokens) bench.run(tokens, report);
    } catch (const std::exception& error) {
        fail(error.what());
    }
}
