#include "moecore/moe_layer.hpp"

#include <utility>

#include "moecore/combine.hpp"
#include "moecore/expert_parallel.hpp"
#include "moecore/gather_rows.hpp"
#include "moecore/route_and_sort.hpp"
#include "moecore/sort_by_expert.hpp"
#include "runtime/weight_rules.hpp"

namespace moecore {
namespace {

const Check kCheck("MoELayer");

void check_sizes(const MoEConfig& config) {
    kCheck.that(config.hidden_size >= 1, "hidden_size must be >= 1, got ", config.hidden_size);
    kCheck.that(config.intermediate_size >= 1, "intermediate_size must be >= 1, got ",
                config.intermediate_size);
    kCheck.that(config.shared_intermediate_size >= 0, "shared_intermediate_size must be >= 0, got ",
                config.shared_intermediate_size);
    kCheck.that(config.first_expert >= 0 && config.num_local_experts >= 1 &&
                    int64_t{config.first_expert} + config.num_local_experts <= config.num_experts,
                "first_expert and num_local_experts must give a range within the ",
                config.num_experts, " experts, got ", config.first_expert, " and ",
                config.num_local_experts);
    kCheck.that(config.dtype == DType::kFloat32 || config.dtype == DType::kBFloat16,
                "dtype must be float32 or bfloat16, got ", name_of(config.dtype));
    kCheck.that(is_gated(config.activation.activation), "activation must be a gated one, got none");
    check_routing("MoELayer", config.routing, config.num_experts);
}

}  // namespace

MoELayer::MoELayer(const MoEConfig& config, const MoEWeights& weights)
    : config_(config), weights_(weights) {
    check_sizes(config);
    const int64_t width = config.hidden_size;
    const int64_t inner = config.intermediate_size;
    const int64_t local = config.num_local_experts;
    const int64_t shared = config.shared_intermediate_size;
    const WeightRules rules{kCheck, config.dtype, device_of(weights.gate_up)};
    rules.matrix("gate_up", weights.gate_up, {local, 2 * inner, width}, true);
    rules.matrix("down", weights.down, {local, width, inner}, false);
    rules.optional_vector("gate_up_bias", weights.gate_up_bias, {local, 2 * inner});
    rules.optional_vector("down_bias", weights.down_bias, {local, width});
    if (weights.selection_bias.defined()) {
        kCheck.shape("selection_bias", weights.selection_bias, {config.num_experts});
        kCheck.dtype("selection_bias", weights.selection_bias, {DType::kFloat32});
        kCheck.contiguous("selection_bias", weights.selection_bias);
        kCheck.device("selection_bias", weights.selection_bias, rules.device);
    }
    if (shared > 0) {
        rules.matrix("shared_gate_up", weights.shared_gate_up, {2 * shared, width}, true);
        rules.matrix("shared_down", weights.shared_down, {width, shared}, false);
    } else {
        kCheck.that(!weights.shared_gate_up.defined() && !weights.shared_down.defined(),
                    "shared_intermediate_size must be > 0 with shared weights, got 0");
    }
    if (weights.shared_gate.defined()) {
        kCheck.that(shared > 0, "shared_gate must come with a shared expert, got none");
        rules.matrix("shared_gate", weights.shared_gate, {1, width}, false);
    }
}

MoELayer::MoELayer(const MoEConfig& config, const MoEWeights& weights, ExpertParallel& ranks,
                   const ExpertParallelConfig& how)
    : MoELayer(config, weights) {
    constexpr int kMaxGroups = 64;
    kCheck.that(how.num_groups >= 0 && how.num_groups <= kMaxGroups, "num_groups must be in [0, ",
                kMaxGroups, "], got ", how.num_groups);
    kCheck.that(how.fixed_tokens >= 0, "fixed_tokens must be >= 0, got ", how.fixed_tokens);
    const bool gathers = how.schedule == Schedule::kAllGather;
    kCheck.that(how.fixed_tokens == 0 || gathers,
                "fixed_tokens must come with the all-gather schedule, got ", how.fixed_tokens);
    kCheck.that(!gathers || how.combine == CombineMode::kExact,
                "combine must be exact with the all-gather schedule, got fast");
    const Device device = device_of(weights.gate_up);
    kCheck.that(device == ranks.transport().device(), "transport must be one of ", device,
                ", where the weights are, got one of ", ranks.transport().device());
    ranks_ = &ranks;
    how_ = how;
}

template <typename Body>
void MoELayer::guarded(Body&& body) const {
    if (ranks_ == nullptr) return body();
    try {
        body();
    } catch (const std::exception& error) {
        ranks_->transport().abort_because(error);
        throw;
    }
}

void MoELayer::check_call(const TensorView& hidden_states, const TensorView& output) const {
    guarded([&] { check_tensors(hidden_states, output); });
}

void MoELayer::check_tensors(const TensorView& hidden_states, const TensorView& output) const {
    kCheck.shape("hidden_states", hidden_states, {Check::kAny, config_.hidden_size});
    kCheck.dtype("hidden_states", hidden_states, {config_.dtype});
    kCheck.rows_contiguous("hidden_states", hidden_states);
    kCheck.shape("output", output, {hidden_states.shape[0], config_.hidden_size});
    kCheck.dtype("output", output, {config_.dtype});
    kCheck.rows_contiguous("output", output);
    const std::pair<const char*, const TensorView*> inputs[] = {
        {"hidden_states", &hidden_states},
        {"gate_up", &weights_.gate_up.plain},
        {"down", &weights_.down.plain},
        {"gate_up_bias", &weights_.gate_up_bias},
        {"down_bias", &weights_.down_bias},
        {"selection_bias", &weights_.selection_bias},
        {"shared_gate_up", &weights_.shared_gate_up.plain},
        {"shared_down", &weights_.shared_down.plain},
        {"shared_gate", &weights_.shared_gate},
    };
    for (const auto& [name, input] : inputs) kCheck.no_overlap("output", output, name, *input);
}

size_t MoELayer::workspace_bytes(int64_t max_tokens) const {
    const auto bytes = Workspace::bytes_for;
    const int64_t rows = max_tokens * config_.routing.top_k;
    size_t total = bytes(DType::kInt32, {rows}) + bytes(DType::kFloat32, {rows});
    if (ranks_ == nullptr)  // else they are scratch memory of `ranks_`, which knows what arrives
        total += 2 * bytes(DType::kInt32, {rows}) +
                 bytes(DType::kInt64, {config_.num_local_experts + 1}) +
                 bytes(config_.dtype, {rows, config_.intermediate_size}) +
                 bytes(config_.dtype, {rows, config_.hidden_size});
    if (config_.shared_intermediate_size > 0)
        total += bytes(config_.dtype, {max_tokens, config_.shared_intermediate_size}) +
                 bytes(config_.dtype, {max_tokens, config_.hidden_size}) +
                 2 * bytes(DType::kFloat32, {max_tokens}) + bytes(DType::kInt32, {max_tokens});
    return total;
}

void MoELayer::forward(const TensorView& hidden_states, const TensorView& router_logits,
                       const TensorView& output, Workspace& workspace, Stream stream) const {
    guarded([&] { run(hidden_states, router_logits, output, workspace, stream); });
}

void MoELayer::run(const TensorView& hidden_states, const TensorView& router_logits,
                   const TensorView& output, Workspace& workspace, Stream stream) const {
    check_tensors(hidden_states, output);
    const int64_t num_tokens = hidden_states.shape[0];
    kCheck.shape("router_logits", router_logits, {num_tokens, config_.num_experts});
    kCheck.no_overlap("output", output, "router_logits", router_logits);
    workspace.reset();
    const int64_t top_k = config_.routing.top_k;
    const TensorView topk_ids = workspace.take(DType::kInt32, {num_tokens, top_k});
    const TensorView topk_weights = workspace.take(DType::kFloat32, {num_tokens, top_k});
    if (ranks_ != nullptr) {
        topk_routing(router_logits, weights_.selection_bias, config_.routing, topk_ids,
                     topk_weights, stream);
        return run_across_ranks(hidden_states, topk_ids, topk_weights, output, workspace, stream);
    }
    const SortedSlots sorted = take_sorted(num_tokens * top_k, workspace);
    route_and_sort(router_logits, weights_.selection_bias, config_.routing, config_.first_expert,
                   topk_ids, topk_weights, sorted.slots, sorted.slot_to_row, sorted.expert_offsets,
                   stream);
    run_experts(hidden_states, sorted, topk_weights, output, workspace, stream);
}

void MoELayer::forward_routed(const TensorView& hidden_states, const TensorView& topk_ids,
                              const TensorView& topk_weights, const TensorView& output,
                              Workspace& workspace, Stream stream) const {
    guarded([&] {
        check_tensors(hidden_states, output);
        kCheck.shape("topk_ids", topk_ids, {hidden_states.shape[0], config_.routing.top_k});
        kCheck.no_overlap("output", output, "topk_ids", topk_ids);
        workspace.reset();
        if (ranks_ != nullptr)
            return run_across_ranks(hidden_states, topk_ids, topk_weights, output, workspace,
                                    stream);
        const SortedSlots sorted = take_sorted(topk_ids.num_elements(), workspace);
        sort_by_expert(topk_ids, config_.first_expert, sorted.slots, sorted.slot_to_row,
                       sorted.expert_offsets, stream);
        run_experts(hidden_states, sorted, topk_weights, output, workspace, stream);
    });
}

bool MoELayer::gathers_first(int64_t num_slots, Device device) const {
    // Hopper's copy engine brings rows that lie side by side faster than threads gather them, by
    // about a twelfth of the GEMM where that computes as fast as it can. The GEMM has 4 * inner
    // flops for each element that a gather moves: wide experts gain from about 48 rows on, where
    // tiles are wide, others only with many.
    constexpr int64_t kWide = 4096, kInner = 2048;
    const int64_t inner = config_.intermediate_size;
    if (device.type != DeviceType::kCuda || inner < kInner) return false;
    const int64_t rows_of_expert = inner >= kWide ? 48 : 384;
    return num_slots >= rows_of_expert * config_.num_local_experts;
}

MoELayer::SortedSlots MoELayer::take_sorted(int64_t num_slots, Workspace& workspace) const {
    return {
        .slots = workspace.take(DType::kInt32, {num_slots}),
        .slot_to_row = workspace.take(DType::kInt32, {num_slots}),
        .expert_offsets = workspace.take(DType::kInt64, {config_.num_local_experts + 1}),
    };
}

void MoELayer::run_experts(const TensorView& hidden_states, const SortedSlots& sorted,
                           const TensorView& topk_weights, const TensorView& output,
                           Workspace& workspace, Stream stream) const {
    const int64_t num_slots = sorted.slots.num_elements();
    const int top_k = config_.routing.top_k;
    const TensorView counters = workspace.counters();

    // 1. Both GEMMs of the experts. The gather happens inside the first, or before it into memory
    //    that the second overwrites.
    const TensorView inner = workspace.take(config_.dtype, {num_slots, config_.intermediate_size});
    const TensorView rows = workspace.take(config_.dtype, {num_slots, config_.hidden_size});
    if (gathers_first(num_slots, hidden_states.device)) {
        gather_rows(hidden_states, sorted.slots, rows, stream, top_k);
        grouped_gemm(rows, weights_.gate_up, weights_.gate_up_bias, sorted.expert_offsets, {}, 1,
                     config_.activation, inner, stream, counters);
    } else {
        grouped_gemm(hidden_states, weights_.gate_up, weights_.gate_up_bias, sorted.expert_offsets,
                     sorted.slots, top_k, config_.activation, inner, stream, counters);
    }
    // Nothing but the GEMM before it may still run, and that writes neither weights nor offsets.
    grouped_gemm(inner, weights_.down, weights_.down_bias, sorted.expert_offsets, {}, 1, {}, rows,
                 stream, counters, Settled::kWeights);

    // 2. The shared expert, then every token's sum.
    TensorView shared_scale;
    const TensorView shared = run_shared(hidden_states, shared_scale, workspace, stream);
    combine(rows, sorted.slot_to_row, topk_weights, shared, shared_scale, output, stream);
}

void MoELayer::run_across_ranks(const TensorView& hidden_states, const TensorView& topk_ids,
                                const TensorView& topk_weights, const TensorView& output,
                                Workspace& workspace, Stream stream) const {
    check_routes(topk_ids, topk_weights, output);
    const auto shared = [&](TensorView& scale) {
        return run_shared(hidden_states, scale, workspace, stream);
    };
    ranks_->forward(
        {config_, weights_, how_, hidden_states, topk_ids, topk_weights, output, shared}, stream);
}

void MoELayer::check_routes(const TensorView& topk_ids, const TensorView& topk_weights,
                            const TensorView& output) const {
    const int64_t num_tokens = output.shape[0];
    kCheck.dtype("topk_ids", topk_ids, {DType::kInt32});
    kCheck.contiguous("topk_ids", topk_ids);
    kCheck.device("topk_ids", topk_ids, output.device);
    kCheck.dtype("topk_weights", topk_weights, {DType::kFloat32});
    kCheck.shape("topk_weights", topk_weights, {num_tokens, config_.routing.top_k});
    kCheck.contiguous("topk_weights", topk_weights);
    kCheck.device("topk_weights", topk_weights, output.device);
}

TensorView MoELayer::run_shared(const TensorView& hidden_states, TensorView& shared_scale,
                                Workspace& workspace, Stream stream) const {
    if (config_.shared_intermediate_size == 0) return {};
    const int64_t num_tokens = hidden_states.shape[0];
    const TensorView inner =
        workspace.take(config_.dtype, {num_tokens, config_.shared_intermediate_size});
    const TensorView output = workspace.take(config_.dtype, {num_tokens, config_.hidden_size});
    linear(hidden_states, weights_.shared_gate_up, {}, config_.activation, inner, stream);
    linear(inner, weights_.shared_down, {}, {}, output, stream);
    if (!weights_.shared_gate.defined()) return output;

    // The sigmoid of the gate's logit is the weight of a routing over one expert.
    const TensorView logits = workspace.take(DType::kFloat32, {num_tokens, 1});
    const TensorView ids = workspace.take(DType::kInt32, {num_tokens, 1});
    const TensorView scale = workspace.take(DType::kFloat32, {num_tokens, 1});
    linear(hidden_states, weights_.shared_gate, {}, {}, logits, stream);
    const RoutingConfig sigmoid{.score_function = ScoreFunction::kSigmoid, .renormalize = false};
    topk_routing(logits, {}, sigmoid, ids, scale, stream);
    shared_scale = TensorView(scale.data, DType::kFloat32, {num_tokens}, scale.device);
    return output;
}

}  // namespace moecore
