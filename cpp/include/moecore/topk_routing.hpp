#pragma once

#include <cstdint>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

enum class ScoreFunction : uint8_t {
    kSoftmax,       ///< over all E experts
    kSigmoid,       ///< of each logit
    kSqrtSoftplus,  ///< sqrt(log(1 + exp(x))) of each logit
    kRawLogits,     ///< choose on the logits, then softmax over the k chosen
};

enum class GroupLimit : uint8_t {
    kNone,
    kMax,      ///< a group's score is its largest choice score
    kTop2Sum,  ///< a group's score is the sum of its two largest choice scores
};

inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxTopK = 32;

/// How a router's logits become experts and weights. With s = score(logits) and
/// c = s + selection_bias: keep the topk_group groups of largest group score, choose the top_k
/// largest c among them, weigh by s (never by c), then
/// w = w / max(sum(w) + norm_epsilon, norm_min) if renormalize, then w = w * scale.
struct RoutingConfig {
    int top_k = 1;  ///< 1 <= k <= min(E, 32)
    ScoreFunction score_function = ScoreFunction::kSoftmax;
    bool renormalize = true;
    float scale = 1.0f;         ///< routed_scaling_factor
    float norm_epsilon = 0.0f;  ///< added to the sum (1e-20 in DeepSeek-V3)
    float norm_min = 0.0f;      ///< smallest divisor (moe_norm_min in ERNIE-4.5)
    GroupLimit group_limit = GroupLimit::kNone;
    int num_groups = 1;  ///< n_group; divides E
    int topk_group = 1;  ///< groups kept, 1 <= topk_group <= num_groups
};

/// Chooses experts for every token. Equal choice scores, and equal groups, go to the lower id; a
/// NaN logit counts as -inf, and so does a NaN bias. Scores are float32 and computed by one fixed
/// sequence of operations on every device, so ids and weights have the same bits on all of them.
/// A row without any logit above -inf gives k distinct ids and NaN weights; so does +inf under
/// softmax or raw logits.
///
/// router_logits   [T, E] float32 or bfloat16, rows contiguous; T >= 0, 1 <= E <= 1024
/// selection_bias  [E] float32, or absent
/// topk_ids        [T, k] int32, out: best first
/// topk_weights    [T, k] float32, out
/// Throws InvalidArgument if a shape, dtype, stride, range or device is not as above.
void topk_routing(const TensorView& router_logits, const TensorView& selection_bias,
                  const RoutingConfig& config, const TensorView& topk_ids,
                  const TensorView& topk_weights, Stream stream = {});

/// Throws InvalidArgument unless `config` can route `num_experts` experts.
void check_routing(const char* op, const RoutingConfig& config, int64_t num_experts);

}  // namespace moecore
