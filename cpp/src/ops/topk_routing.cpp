#include "moecore/topk_routing.hpp"

#include <cmath>

#include "moecore/kernels/memory.hpp"
#include "ops/routing.hpp"

namespace moecore {

void check_routing(const char* op, const RoutingConfig& config, int64_t num_experts) {
    const Check check(op);
    check.that(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts must be in [1, ",
               kMaxExperts, "], got ", num_experts);
    check.that(config.top_k >= 1 && config.top_k <= kMaxTopK && config.top_k <= num_experts,
               "top_k must be in [1, min(num_experts, ", kMaxTopK, ")], got ", config.top_k,
               " with num_experts ", num_experts);
    check.that(std::isfinite(config.scale), "scale must be finite, got ", config.scale);
    check.that(std::isfinite(config.norm_epsilon) && config.norm_epsilon >= 0,
               "norm_epsilon must be finite and >= 0, got ", config.norm_epsilon);
    check.that(std::isfinite(config.norm_min) && config.norm_min >= 0,
               "norm_min must be finite and >= 0, got ", config.norm_min);
    if (config.group_limit == GroupLimit::kNone) return;
    check.that(config.num_groups >= 1 && num_experts % config.num_groups == 0,
               "num_groups must be a positive divisor of num_experts, got ", config.num_groups,
               " with num_experts ", num_experts);
    check.that(config.topk_group >= 1 && config.topk_group <= config.num_groups,
               "topk_group must be in [1, num_groups], got ", config.topk_group,
               " with num_groups ", config.num_groups);
    const int64_t kept = num_experts / config.num_groups * config.topk_group;
    check.that(config.top_k <= kept, "top_k must be at most the ", kept,
               " experts of topk_group groups, got ", config.top_k);
}

TopkRoutingArgs checked_topk_routing(const Check& check, const char* op,
                                     const TensorView& router_logits,
                                     const TensorView& selection_bias, const RoutingConfig& config,
                                     const TensorView& topk_ids, const TensorView& topk_weights) {
    check.dtype("router_logits", router_logits, {DType::kFloat32, DType::kBFloat16});
    check.shape("router_logits", router_logits, {Check::kAny, Check::kAny});
    check.rows_contiguous("router_logits", router_logits);
    const int64_t num_tokens = router_logits.shape[0];
    const int64_t num_experts = router_logits.shape[1];
    check_routing(op, config, num_experts);
    if (selection_bias.defined()) {
        check.dtype("selection_bias", selection_bias, {DType::kFloat32});
        check.shape("selection_bias", selection_bias, {num_experts});
        check.contiguous("selection_bias", selection_bias);
        check.device("selection_bias", selection_bias, router_logits.device);
    }
    check.dtype("topk_ids", topk_ids, {DType::kInt32});
    check.dtype("topk_weights", topk_weights, {DType::kFloat32});
    for (const auto& [name, view] :
         {std::pair{"topk_ids", &topk_ids}, std::pair{"topk_weights", &topk_weights}}) {
        check.shape(name, *view, {num_tokens, config.top_k});
        check.contiguous(name, *view);
        check.device(name, *view, router_logits.device);
        check.no_overlap(name, *view, "router_logits", router_logits);
        check.no_overlap(name, *view, "selection_bias", selection_bias);
    }
    check.no_overlap("topk_weights", topk_weights, "topk_ids", topk_ids);

    return {
        .router_logits = router_logits.data,
        .selection_bias = selection_bias.defined() ? selection_bias.as<float>() : nullptr,
        .topk_ids = topk_ids.as<int32_t>(),
        .topk_weights = topk_weights.as<float>(),
        .num_tokens = num_tokens,
        .logits_stride = router_logits.strides[0],
        .num_experts = static_cast<int>(num_experts),
        .logits_dtype = router_logits.dtype,
        .config = config,
    };
}

void topk_routing(const TensorView& router_logits, const TensorView& selection_bias,
                  const RoutingConfig& config, const TensorView& topk_ids,
                  const TensorView& topk_weights, Stream stream) {
    constexpr const char* kOp = "topk_routing";
    const TopkRoutingArgs args = checked_topk_routing(
        Check(kOp), kOp, router_logits, selection_bias, config, topk_ids, topk_weights);
    switch (router_logits.device.type) {
        case DeviceType::kCpu:
            return cpu::topk_routing(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(router_logits.device.index);
            return cuda::topk_routing(args, stream);
        }
    }
}

}  // namespace moecore
