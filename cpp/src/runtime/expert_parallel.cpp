#include "moecore/expert_parallel.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "moecore/error.hpp"
#include "runtime/agreement.hpp"
#include "runtime/all_gather.hpp"
#include "runtime/all_to_all.hpp"
#include "runtime/current_device.hpp"
#include "runtime/lent_rows.hpp"

namespace moecore {

struct ExpertParallel::State {
    EpResources resources;
    std::vector<std::unique_ptr<FixedShape>> shapes;
    cuda::PinnedBuffer routes;  ///< ids and weights that a GPU has made
    int64_t num_calls = 0;

    explicit State(Transport& transport) : resources(transport) {}
};

namespace {

/// A call's routes in host memory. On CUDA waits until the device has made them.
HostRoutes routes_on_host(Transport& transport, const ExpertParallel::Call& call,
                          cuda::PinnedBuffer& staging, Stream stream) {
    if (transport.device().type == DeviceType::kCpu)
        return {call.topk_ids.as<int32_t>(), call.topk_weights.as<float>()};
    const auto count = static_cast<size_t>(call.topk_ids.num_elements());
    const bool with_weights = call.how.combine == CombineMode::kFast;
    char* host =
        static_cast<char*>(staging.reserve(std::max<size_t>(count, 1) * 2 * sizeof(float)));
    char* weights = host + count * sizeof(int32_t);
    cuda::copy(host, call.topk_ids.data, count * sizeof(int32_t), stream);
    if (with_weights) cuda::copy(weights, call.topk_weights.data, count * sizeof(float), stream);
    transport.synchronize("read routes", stream);
    return {reinterpret_cast<int32_t*>(host), reinterpret_cast<float*>(weights)};
}

LayerLoad load_of(const Transport& transport, const MoEConfig& config,
                  const ExpertParallelConfig& how, const std::vector<int64_t>& num_tokens) {
    return {.num_ranks = static_cast<int>(num_tokens.size()),
            .hidden_size = config.hidden_size,
            .intermediate_size = config.intermediate_size,
            .num_experts = config.num_experts,
            .top_k = config.routing.top_k,
            .element_bytes = static_cast<int64_t>(size_of(config.dtype)),
            .max_tokens = *std::max_element(num_tokens.begin(), num_tokens.end()),
            .total_tokens = std::accumulate(num_tokens.begin(), num_tokens.end(), int64_t{0}),
            .returns_sums = how.combine == CombineMode::kFast,
            .writes_directly = can_lend_rows(transport, 1)};
}

}  // namespace

ExpertParallel::ExpertParallel(Transport& transport)
    : transport_(transport),
      figures_(typical_figures(transport.device().type)),
      state_(std::make_unique<State>(transport)) {}
ExpertParallel::~ExpertParallel() = default;

void ExpertParallel::fix_tokens(int64_t tokens) {
    require(tokens >= 0, "ExpertParallel: fixed_tokens must be >= 0, got ", tokens);
    fixed_tokens_ = tokens;
}

void ExpertParallel::forward(const Call& call, Stream stream) {
    if (fixed_tokens_ == 0) return run(call, stream);
    ExpertParallelConfig how = call.how;
    how.schedule = Schedule::kAllGather;
    how.combine = CombineMode::kExact;
    how.fixed_tokens = fixed_tokens_;
    run({call.config, call.weights, how, call.hidden_states, call.topk_ids, call.topk_weights,
         call.output, call.run_shared},
        stream);
}

void ExpertParallel::run(const Call& call, Stream stream) {
    const Device device = transport_.device();
    const CurrentDevice scope(device);
    State& state = *state_;
    const int64_t fixed_tokens = call.how.fixed_tokens;
    const int64_t num_tokens = call.hidden_states.shape[0];
    require(fixed_tokens == 0 || num_tokens <= fixed_tokens,
            "MoELayer: hidden_states must have at most fixed_tokens = ", fixed_tokens,
            " rows, got ", num_tokens);
    ++state.num_calls;
    if (fixed_tokens > 0 && find_shape(state.shapes, call.config, fixed_tokens) != nullptr)
        return run_fixed(call, fixed_tokens, {}, stream);

    // Routes that are in host memory may travel with the sizes; those of a device follow, if they
    // are needed at all.
    HostRoutes routes;
    const bool is_on_host = device.type == DeviceType::kCpu;
    if (is_on_host) routes = routes_on_host(transport_, call, state.routes, stream);
    Agreement agreement = agree(transport_, call.config, call.how, state.num_calls, num_tokens,
                                is_on_host ? &routes : nullptr);
    const LayerLoad load = load_of(transport_, call.config, call.how, agreement.num_tokens);
    const Schedule wanted =
        call.how.combine == CombineMode::kFast ? Schedule::kAllToAll : call.how.schedule;
    choice_ = choose_schedule(load, figures_, wanted, call.how.num_groups);
    if (choice_.schedule == Schedule::kAllGather)
        return run_fixed(call, fixed_tokens > 0 ? fixed_tokens : load.max_tokens, agreement.ranges,
                         stream);
    if (needs_host_routes(transport_, agreement, choice_.num_groups)) {
        if (!is_on_host) routes = routes_on_host(transport_, call, state.routes, stream);
        exchange_routes(transport_, call.config, call.how, routes, agreement);
    }
    run_all_to_all(state.resources, call, agreement, choice_.num_groups, stream);
}

void ExpertParallel::run_fixed(const Call& call, int64_t tokens_per_rank,
                               const std::vector<ExpertRange>& ranges, Stream stream) {
    auto& shapes = state_->shapes;
    FixedShape* shape = find_shape(shapes, call.config, call.how.fixed_tokens);
    if (shape == nullptr) {
        shapes.push_back(
            make_shape(call.config, call.how.fixed_tokens, ranges, transport_.device()));
        shape = shapes.back().get();
    }
    run_all_gather(state_->resources, call, *shape, tokens_per_rank, stream);
}

void ExpertParallel::measure() {
    using Clock = std::chrono::steady_clock;
    const auto us_since = [](Clock::time_point start) {
        return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
    };
    constexpr int kRounds = 11;
    const Device device = transport_.device();
    const CurrentDevice scope(device);
    const auto ranks = static_cast<size_t>(transport_.size());
    const size_t others = std::max<size_t>(ranks - 1, 1);
    // A GPU's link needs many bytes before they outweigh what differs from call to call.
    const size_t many =
        device.type == DeviceType::kCpu ? size_t{8} << 20 : (size_t{64} << 20) / others;
    const size_t few = many / 8;
    Buffer send(device, many * ranks), received(device, many * ranks);
    const auto round = [&](int64_t rows) {
        const std::vector<int64_t> counts(ranks, rows);
        transport_.all_to_all_v("measure", {.data = send.data(), .counts = counts},
                                {.data = received.data(), .counts = counts}, 1, {});
        transport_.synchronize("measure", {});
    };
    // What disturbs a call only makes it longer: the shortest is the link's.
    const auto shortest_us = [&](int64_t rows) {
        std::vector<double> times;
        for (int i = 0; i < kRounds; ++i) {
            transport_.barrier("measure");
            const Clock::time_point start = Clock::now();
            round(rows);
            times.push_back(us_since(start));
        }
        return *std::min_element(times.begin(), times.end());
    };
    // Of one byte, and of two sizes whose difference is free of what every call costs.
    const double mine[3] = {shortest_us(1), shortest_us(static_cast<int64_t>(few)),
                            shortest_us(static_cast<int64_t>(many))};
    std::vector<double> all(3 * ranks);
    transport_.all_gather("measure", mine, all.data(), sizeof mine);
    double latency_us = 0.0, few_us = 0.0, many_us = 0.0;
    for (size_t r = 0; r < ranks; ++r) {
        latency_us = std::max(latency_us, all[3 * r]);
        few_us = std::max(few_us, all[3 * r + 1]);
        many_us = std::max(many_us, all[3 * r + 2]);
    }
    figures_.link_latency_us = latency_us;
    const auto bytes = static_cast<double>((many - few) * others);
    // No link is faster than this; a smaller difference is noise.
    constexpr double kFastestGbps = 1000.0;
    figures_.link_gbps = bytes / std::max(many_us - few_us, bytes / (kFastestGbps * 1e3)) * 1e-3;
}

void ExpertParallel::start_trace() { state_->resources.timeline.start(transport_.device()); }

std::vector<PhaseTime> ExpertParallel::phase_times() {
    std::vector<PhaseTime> phases;
    for (const Timeline::Span& span : state_->resources.timeline.spans()) {
        auto phase = std::find_if(phases.begin(), phases.end(),
                                  [&](const PhaseTime& p) { return p.name == span.name; });
        if (phase == phases.end())
            phase = phases.insert(
                phases.end(), {.name = span.name,
                               .is_communication = span.lane == Timeline::Lane::kCommunication});
        ++phase->count;
        phase->total_us += span.end_us - span.begin_us;
    }
    return phases;
}

std::string ExpertParallel::trace_events() {
    return state_->resources.timeline.chrome_trace(transport_.rank());
}

}  // namespace moecore
