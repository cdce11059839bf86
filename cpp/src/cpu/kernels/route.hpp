#pragma once

// Routing of a range of tokens. Included after simd/*.hpp.

#include <cstdint>

#include "cpu/kernels/math.hpp"
#include "moecore/kernels/topk_routing.hpp"

namespace moecore::cpu {
namespace {

/// Sums of up to 1024 scores go through 32 partial sums, i mod 32, then halves: 16, 8, 4, 2, 1.
constexpr int kSumLanes = 32;

/// Order-preserving map of floats to int32; -0 equals +0, NaN counts as -inf. INT32_MIN and the
/// value above it are below every float: they mark taken experts and dropped groups.
inline I32x16 order_key(F32x16 x) {
    x = select(is_nan(x), F32x16::broadcast(-__builtin_huge_valf()), x);
    const I32x16 bits = bits_of(add(x, F32x16::broadcast(0.0f)));  // -0 + 0 is +0
    const I32x16 sign = shift_right_arithmetic<31>(bits);
    return bit_xor(bits, bit_and(sign, I32x16::broadcast(0x7fffffff)));
}
constexpr int32_t kTakenKey = INT32_MIN;
constexpr int32_t kDroppedKey = INT32_MIN + 1;
constexpr float kInfinity = __builtin_huge_valf();

/// One token's logits, scores and choice keys, padded to whole vectors.
struct RouteRow {
    float logit[kMaxExperts + kLanes];
    float score[kMaxExperts + kLanes];
    float choice[kMaxExperts + kLanes];
    int32_t key[kMaxExperts + kLanes];
};

inline int32_t largest(const int32_t* key, int padded) {
    I32x16 best = I32x16::load(key);
    for (int e = kLanes; e < padded; e += kLanes) best = max(best, I32x16::load(key + e));
    int32_t lane[kLanes];
    best.store(lane);
    int32_t result = lane[0];
    for (int i = 1; i < kLanes; ++i) result = lane[i] > result ? lane[i] : result;
    return result;
}

/// The lowest index of `value`, which is present.
inline int first_equal(const int32_t* key, int32_t value) {
    const I32x16 wanted = I32x16::broadcast(value);
    for (int e = 0;; e += kLanes) {
        const uint32_t bits = equal_bits(I32x16::load(key + e), wanted);
        if (bits != 0) return e + __builtin_ctz(bits);
    }
}

inline void load_logits(const TopkRoutingArgs& args, int64_t token, int padded, RouteRow& row) {
    const int64_t start = token * args.logits_stride;
    const int num_experts = args.num_experts;
    for (int e = 0; e < padded; e += kLanes) F32x16::broadcast(-kInfinity).store(row.logit + e);
    if (args.logits_dtype == DType::kBFloat16) {
        const uint16_t* source = static_cast<const uint16_t*>(args.router_logits) + start;
        int e = 0;
        for (; e + kLanes <= num_experts; e += kLanes)
            F32x16::load_bf16(source + e).store(row.logit + e);
        if (e < num_experts) {
            uint16_t tail[kLanes] = {};
            for (int i = e; i < num_experts; ++i) tail[i - e] = source[i];
            F32x16::load_bf16(tail).store(row.logit + e);
            for (int i = num_experts; i < padded; ++i) row.logit[i] = -kInfinity;
        }
    } else {
        const float* source = static_cast<const float*>(args.router_logits) + start;
        for (int e = 0; e < num_experts; ++e) row.logit[e] = source[e];
    }
    const F32x16 lowest = F32x16::broadcast(-kInfinity);
    for (int e = 0; e < padded; e += kLanes) {
        const F32x16 x = F32x16::load(row.logit + e);
        select(is_nan(x), lowest, x).store(row.logit + e);
    }
}

/// Fills row.score for all experts. Softmax is divided by its sum only where that can matter.
inline void compute_scores(const TopkRoutingArgs& args, int padded, float row_max, RouteRow& row) {
    const F32x16 shift = F32x16::broadcast(row_max);
    switch (args.config.score_function) {
        case ScoreFunction::kSigmoid:
            for (int e = 0; e < padded; e += kLanes)
                sigmoid(F32x16::load(row.logit + e)).store(row.score + e);
            return;
        case ScoreFunction::kSqrtSoftplus:
            for (int e = 0; e < padded; e += kLanes)
                sqrt_softplus(F32x16::load(row.logit + e)).store(row.score + e);
            return;
        case ScoreFunction::kRawLogits:
        case ScoreFunction::kSoftmax:
            for (int e = 0; e < padded; e += kLanes)
                exp(sub(F32x16::load(row.logit + e), shift)).store(row.score + e);
            break;
    }
    if (!args.divide_softmax()) return;
    float partial[kSumLanes] = {};
    F32x16 low = F32x16::broadcast(0.0f), high = low;
    for (int e = 0; e < padded; e += kSumLanes) {
        low = add(low, F32x16::load(row.score + e));
        if (e + kLanes < padded) high = add(high, F32x16::load(row.score + e + kLanes));
    }
    low.store(partial);
    high.store(partial + kLanes);
    for (int half = kSumLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
    const F32x16 sum = F32x16::broadcast(partial[0]);
    for (int e = 0; e < padded; e += kLanes)
        div(F32x16::load(row.score + e), sum).store(row.score + e);
}

/// Drops the groups outside the topk_group best: their keys become kDroppedKey.
inline void limit_groups(const TopkRoutingArgs& args, RouteRow& row) {
    const RoutingConfig& config = args.config;
    const int size = args.num_experts / config.num_groups;
    float group_score[kMaxExperts + kLanes];
    int32_t group_key[kMaxExperts + kLanes];
    const int padded = (config.num_groups + kLanes - 1) / kLanes * kLanes;
    for (int g = 0; g < padded; ++g) group_score[g] = -kInfinity;
    for (int g = 0; g < config.num_groups; ++g) {
        float best = -kInfinity, second = -kInfinity;
        for (int e = g * size; e < (g + 1) * size; ++e) {
            const float x = row.choice[e];
            if (x > best) {
                second = best;
                best = x;
            } else if (x > second) {
                second = x;
            }
        }
        const bool add_second = config.group_limit == GroupLimit::kTop2Sum && size > 1;
        group_score[g] = add_second ? best + second : best;
    }
    for (int g = 0; g < padded; g += kLanes)
        order_key(F32x16::load(group_score + g)).store(group_key + g);
    for (int g = config.num_groups; g < padded; ++g) group_key[g] = kTakenKey;
    for (int i = 0; i < config.topk_group; ++i)
        group_key[first_equal(group_key, largest(group_key, padded))] = kTakenKey;
    for (int g = 0; g < config.num_groups; ++g) {
        if (group_key[g] == kTakenKey) continue;
        for (int e = g * size; e < (g + 1) * size; ++e) row.key[e] = kDroppedKey;
    }
}

inline void route_token(const TopkRoutingArgs& args, int64_t token, RouteRow& row) {
    const RoutingConfig& config = args.config;
    const int num_experts = args.num_experts;
    const int top_k = config.top_k;
    const int padded = (num_experts + kLanes - 1) / kLanes * kLanes;

    // 1. Load, and find the largest logit.
    load_logits(args, token, padded, row);
    float row_max = -kInfinity;
    for (int e = 0; e < num_experts; ++e) row_max = row.logit[e] > row_max ? row.logit[e] : row_max;

    // 2. Score every expert. Without a bias or a group sum only the chosen ones are needed, but a
    //    row of scores costs little beside the GEMMs.
    compute_scores(args, padded, row_max, row);

    // 3. What the choice is made on.
    const float* base = args.choose_on_scores() ? row.score : row.logit;
    for (int e = 0; e < padded; ++e) row.choice[e] = base[e];
    if (args.selection_bias != nullptr)
        for (int e = 0; e < num_experts; ++e) row.choice[e] = base[e] + args.selection_bias[e];
    const F32x16 lowest = F32x16::broadcast(-kInfinity);
    for (int e = 0; e < padded; e += kLanes) {
        F32x16 x = F32x16::load(row.choice + e);
        x = select(is_nan(x), lowest, x);
        x.store(row.choice + e);
        order_key(x).store(row.key + e);
    }
    for (int e = num_experts; e < padded; ++e) row.key[e] = kTakenKey;

    // 4. Select.
    if (config.group_limit != GroupLimit::kNone && config.topk_group < config.num_groups)
        limit_groups(args, row);
    int32_t* ids = args.topk_ids + token * top_k;
    float* weights = args.topk_weights + token * top_k;
    for (int j = 0; j < top_k; ++j) {
        const int expert = first_equal(row.key, largest(row.key, padded));
        row.key[expert] = kTakenKey;
        ids[j] = expert;
        weights[j] = row.score[expert];
    }

    // 5. Weigh.
    float sum = 0.0f;
    for (int j = 0; j < top_k; ++j) sum += weights[j];
    const bool is_exponential = config.score_function == ScoreFunction::kSoftmax ||
                                config.score_function == ScoreFunction::kRawLogits;
    const bool undefined = row_max == -kInfinity || (is_exponential && row_max == kInfinity);
    float divisor = 1.0f;
    if (config.score_function == ScoreFunction::kRawLogits) divisor = sum;
    if (config.renormalize && config.score_function != ScoreFunction::kRawLogits) {
        divisor = sum + config.norm_epsilon;
        divisor = divisor < config.norm_min ? config.norm_min : divisor;
    }
    for (int j = 0; j < top_k; ++j)
        weights[j] = undefined ? __builtin_nanf("") : weights[j] / divisor * config.scale;
}

inline void route_tokens(const TopkRoutingArgs& args, int64_t begin, int64_t end) {
    RouteRow row;
    for (int64_t token = begin; token < end; ++token) route_token(args, token, row);
}

}  // namespace
}  // namespace moecore::cpu
