#pragma once

#include <cstdint>

#include "moecore/stream.hpp"
#include "moecore/topk_routing.hpp"

namespace moecore {

/// What every topk_routing kernel takes, CPU or CUDA. Built and checked by ops/topk_routing.cpp;
/// kernels trust it. T tokens, E experts, k = config.top_k.
struct TopkRoutingArgs {
    const void* router_logits;    ///< [T, E] float32 or bfloat16, as `logits_dtype` says
    const float* selection_bias;  ///< [E] or nullptr
    int32_t* topk_ids;            ///< [T, k] out
    float* topk_weights;          ///< [T, k] out
    int64_t num_tokens;           ///< T >= 0
    int64_t logits_stride;        ///< elements from one token's logits to the next
    int num_experts;              ///< 1 <= E <= 1024
    DType logits_dtype;
    RoutingConfig config;

    /// Choice needs the scores themselves; otherwise the logits order experts alike, without ties
    /// that rounding of the score would make.
    bool choose_on_scores() const {
        return config.score_function != ScoreFunction::kRawLogits &&
               (selection_bias != nullptr || config.group_limit == GroupLimit::kTop2Sum);
    }

    /// Whether softmax must be divided by its sum over all E: renormalising cancels that sum,
    /// unless the choice or the divisor's bounds see the scores.
    bool divide_softmax() const {
        return config.score_function == ScoreFunction::kSoftmax &&
               (!config.renormalize || choose_on_scores() || config.norm_epsilon > 0 ||
                config.norm_min > 0);
    }
};

namespace cpu {
void topk_routing(const TopkRoutingArgs& args);
}
namespace cuda {
void topk_routing(const TopkRoutingArgs& args, Stream stream);
}

}  // namespace moecore
