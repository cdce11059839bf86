// One MoE layer over ranks: what of its communication remains exposed.
//
//   full     the layer, barrier-aligned, the slowest rank
//   echo     the same plan without communication: no row moves, the routes are known
//   exposed  full - echo; share = exposed / full
//   alone    one rank with all experts and all tokens, divided by the ranks: what would be ideal
//
// T tokens on every rank, routed at random. correct: rank 0's output has the bits of a layer with
// all experts.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>

#include "ep_transports.hpp"
#include "harness.hpp"
#include "moecore/expert_parallel.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/threads.hpp"
#include "ranks.hpp"

namespace moecore::bench {
namespace {

/// A tensor on the transport's device with the values of `host`.
OwnedTensor on_device(const OwnedTensor& host, Device device, Transport& transport) {
    const TensorView& view = host.view;
    const size_t bytes = static_cast<size_t>(view.num_elements()) * size_of(view.dtype);
    OwnedTensor result{Buffer(device, bytes), view};
    result.view.data = result.buffer.data();
    result.view.device = device;
    if (device.type == DeviceType::kCuda) {
        cuda::copy(result.buffer.data(), view.data, bytes, {});
        transport.synchronize("copy", {});
    } else {
        std::memcpy(result.buffer.data(), view.data, bytes);
    }
    return result;
}

/// Experts of `range`, the same values whoever holds them.
struct Experts {
    OwnedTensor gate_up, down;

    Experts(const LayerShape& shape, ExpertRange range, Transport& transport) {
        const int64_t h = shape.hidden_size, i = shape.intermediate_size;
        const auto make = [&](int64_t n, int64_t k, uint64_t seed) {
            OwnedTensor all = empty_tensor(DType::kBFloat16, {range.count, n, k});
            for (int e = 0; e < range.count; ++e) {
                const OwnedTensor one = random_tensor(
                    DType::kBFloat16, {n, k}, 0.02f, seed + static_cast<uint64_t>(range.first + e));
                const size_t bytes = static_cast<size_t>(n * k) * 2;
                std::memcpy(all.view.as<char>() + static_cast<size_t>(e) * bytes, one.view.data,
                            bytes);
            }
            return on_device(all, transport.device(), transport);
        };
        gate_up = make(2 * i, h, 1000);
        down = make(h, i, 100000);
    }
    MoEWeights weights() const {
        MoEWeights weights;
        weights.gate_up = gate_up.view;
        weights.down = down.view;
        return weights;
    }
};

MoEConfig config_of(const LayerShape& shape, ExpertRange range) {
    MoEConfig config;
    config.hidden_size = shape.hidden_size;
    config.intermediate_size = shape.intermediate_size;
    config.num_experts = shape.num_experts;
    config.first_expert = range.first;
    config.num_local_experts = range.count;
    config.routing = {.top_k = shape.top_k};
    config.activation.activation = Activation::kSwiglu;
    return config;
}

/// A rank's tokens, their routing and their place.
struct Tokens {
    OwnedTensor hidden, logits, output;
    Tokens(const LayerShape& shape, int64_t count, uint64_t seed, Transport& transport)
        : hidden(on_device(random_tensor(DType::kBFloat16, {count, shape.hidden_size}, 1.0f, seed),
                           transport.device(), transport)),
          logits(
              on_device(random_tensor(DType::kFloat32, {count, shape.num_experts}, 1.0f, seed + 7),
                        transport.device(), transport)),
          output(on_device(empty_tensor(DType::kBFloat16, {count, shape.hidden_size}),
                           transport.device(), transport)) {}

    std::vector<char> bytes(Transport& transport) const {
        const size_t count = static_cast<size_t>(output.view.num_elements()) * 2;
        std::vector<char> result(count);
        if (output.view.device.type == DeviceType::kCuda) {
            cuda::copy(result.data(), output.view.data, count, {});
            transport.synchronize("copy", {});
        } else {
            std::memcpy(result.data(), output.view.data, count);
        }
        return result;
    }
};

void forward(const MoELayer& layer, const Tokens& tokens, Workspace& workspace) {
    workspace.grow(layer.workspace_bytes(tokens.hidden.view.shape[0]));
    layer.forward(tokens.hidden.view, tokens.logits.view, tokens.output.view, workspace);
}

/// Barrier-aligned medians of the slowest rank.
double time_layer(Transport& transport, int repeats, const std::function<void()>& run) {
    std::vector<double> times;
    for (int i = 0; i < repeats + 2; ++i) {
        transport.barrier("bench");
        const double start = now_us();
        run();
        transport.synchronize("bench", {});
        if (i >= 2) times.push_back(now_us() - start);
    }
    return max_over_ranks(transport, {median(times)})[0];
}

/// Joins every rank's events into one file.
void write_trace(Transport& transport, const std::string& path, const std::string& events) {
    const auto ranks = static_cast<size_t>(transport.size());
    std::vector<int64_t> lengths(ranks);
    const auto mine = static_cast<int64_t>(events.size());
    transport.all_gather("trace", &mine, lengths.data(), sizeof mine);
    const auto longest = static_cast<size_t>(*std::max_element(lengths.begin(), lengths.end()));
    std::string padded = events;
    padded.resize(longest);
    std::vector<char> all(longest * ranks);
    transport.all_gather("trace", padded.data(), all.data(), longest);
    if (transport.rank() != 0) return;
    std::ofstream file(path);
    file << "{\"traceEvents\":[\n";
    for (size_t r = 0; r < ranks; ++r)
        file << (r == 0 ? "" : ",\n")
             << std::string(all.data() + r * longest, static_cast<size_t>(lengths[r]));
    file << "\n]}\n";
}

struct Case {
    const char* name;
    ExpertParallelConfig how;
};

class Bench {
public:
    Bench(Transport& transport, const LayerShape& shape, const Options& options,
          const RankOptions& rank_options)
        : transport_(transport),
          shape_(shape),
          options_(options),
          rank_options_(rank_options),
          range_(expert_range(shape.num_experts, transport.rank(), transport.size())),
          experts_(shape, range_, transport) {
        if (transport.rank() == 0)
            whole_ = std::make_unique<Experts>(shape, ExpertRange{0, shape.num_experts}, transport);
    }

    /// `report`: of rank 0.
    void run(int64_t num_tokens, std::optional<Report>& report) {
        const Tokens tokens(shape_, num_tokens, 11 + static_cast<uint64_t>(transport_.rank()),
                            transport_);
        Workspace workspace(transport_.device(), 0);
        std::vector<char> wanted;
        double alone = 0.0;
        if (whole_ != nullptr) {
            const MoELayer layer(config_of(shape_, {0, shape_.num_experts}), whole_->weights());
            forward(layer, tokens, workspace);
            wanted = tokens.bytes(transport_);
            alone = time_alone(layer, num_tokens);
        }
        const Case cases[] = {
            {"a2a 1", {.schedule = Schedule::kAllToAll, .num_groups = 1}},
            {"a2a 2", {.schedule = Schedule::kAllToAll, .num_groups = 2}},
            {"a2a 4", {.schedule = Schedule::kAllToAll, .num_groups = 4}},
            {"fast 1", {.combine = CombineMode::kFast, .num_groups = 1}},
            {"all-gather", {.schedule = Schedule::kAllGather, .fixed_tokens = num_tokens}},
            {"auto", {}},
        };
        for (const Case& one : cases) {
            const bool is_large_gather =
                one.how.schedule == Schedule::kAllGather &&
                num_tokens * shape_.top_k * transport_.size() * shape_.hidden_size > (1 << 28);
            if (!is_large_gather) run_case(one, num_tokens, tokens, wanted, alone, report);
        }
    }

private:
    double time_alone(const MoELayer& layer, int64_t num_tokens) {
        const Tokens all(shape_, num_tokens * transport_.size(), 5, transport_);
        Workspace workspace(transport_.device(), 0);
        std::vector<double> times;
        for (int i = 0; i < options_.repeats + 2; ++i) {
            const double start = now_us();
            forward(layer, all, workspace);
            transport_.synchronize("bench", {});
            times.push_back(now_us() - start);
        }
        return median(times) / transport_.size();
    }

    void run_case(const Case& one, int64_t num_tokens, const Tokens& tokens,
                  const std::vector<char>& wanted, double alone, std::optional<Report>& report) {
        Workspace workspace(transport_.device(), 0);
        ExpertParallel ranks(transport_);
        ranks.measure();
        const MoELayer layer(config_of(shape_, range_), experts_.weights(), ranks, one.how);
        const double full =
            time_layer(transport_, options_.repeats, [&] { forward(layer, tokens, workspace); });
        const std::string reason = ranks.last_choice().reason;
        const bool is_right = transport_.rank() != 0 || tokens.bytes(transport_) == wanted;
        ranks.start_trace();
        constexpr int kTraced = 5;
        for (int i = 0; i < kTraced; ++i) {
            transport_.barrier("trace");
            forward(layer, tokens, workspace);
        }
        transport_.synchronize("trace", {});
        std::string phases;
        for (const PhaseTime& phase : ranks.phase_times())
            phases += (phases.empty() ? "" : ", ") + phase.name + " " +
                      format(phase.total_us / kTraced, 0);
        if (!rank_options_.trace_file.empty())
            write_trace(transport_, rank_options_.trace_file, ranks.trace_events());

        EchoTransport echo(transport_);
        ExpertParallel echo_ranks(echo);
        echo_ranks.set_figures(ranks.figures());
        const MoELayer echo_layer(config_of(shape_, range_), experts_.weights(), echo_ranks,
                                  one.how);
        forward(echo_layer, tokens, workspace);  // agrees on fixed shapes
        echo.set_recording(true);
        forward(echo_layer, tokens, workspace);
        transport_.synchronize("bench", {});
        echo.set_recording(false);
        const double without = time_layer(transport_, options_.repeats,
                                          [&] { forward(echo_layer, tokens, workspace); });
        if (transport_.rank() != 0) return;
        report->row({shape_.name, std::to_string(transport_.size()), std::to_string(num_tokens),
                     one.name, format(full, 0), format(without, 0), format(full - without, 0),
                     format((full - without) / full, 2), format(alone, 0),
                     one.how.combine == CombineMode::kFast ? "-"
                     : is_right                            ? "yes"
                                                           : "NO"});
        report->note("  rank 0, us: " + phases);
        report->note("  " + reason);
    }

    Transport& transport_;
    const LayerShape& shape_;
    const Options& options_;
    const RankOptions& rank_options_;
    ExpertRange range_;
    Experts experts_;
    std::unique_ptr<Experts> whole_;
};

}  // namespace
}  // namespace moecore::bench

int main(int argc, char** argv) {
    using namespace moecore::bench;
    const RankOptions ranks = take_rank_options(argc, argv);
    const Options options = parse_options(argc, argv, {1, 32, 512}, kRankOptions);
    const std::string wanted = options.shape.empty() ? "small-many" : options.shape;
    const auto& shapes = layer_shapes();
    const auto shape = std::find_if(shapes.begin(), shapes.end(),
                                    [&](const LayerShape& s) { return wanted == s.name; });
    if (shape == shapes.end()) {
        std::fprintf(stderr, "--shape must be a known layer, got %s\n", wanted.c_str());
        return 2;
    }
    run_group(ranks, [&](moecore::Transport& transport) {
        Bench bench(transport, *shape, options, ranks);
        std::optional<Report> report;
        if (transport.rank() == 0) {
            report.emplace(
                options.json,
                std::vector<std::string>{"shape", "ranks", "T", "schedule", "full_us", "echo_us",
                                         "exposed_us", "share", "alone_us", "correct"});
            report->note(std::string(transport.kind()) +
                         (ranks.emulated_gbps > 0 ? ": no measurement of a link" : ""));
        }
        for (const int64_t tokens : options.tokens) bench.run(tokens, report);
    });
}
