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

inline float float_of_key(int32_t key) {
    return __builtin_bit_cast(float, key ^ (key >> 31 & 0x7fffffff));
}

constexpr int kMaxBlocks = kMaxExperts / kLanes;  ///< of sixteen experts

/// One token's logits, scores and choice keys, padded to whole vectors.
struct RouteRow {
    alignas(64) float logit[kMaxExperts + kLanes];
    alignas(64) float score[kMaxExperts + kLanes];
    alignas(64) int32_t key[kMaxExperts + kLanes];
    alignas(64) int32_t block_key[kMaxBlocks];  ///< the largest of each sixteen keys
};

constexpr int padded_to_lanes(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

/// The largest key, in every lane.
inline I32x16 largest(const int32_t* key, int padded) {
    I32x16 best = I32x16::load(key);
    for (int e = kLanes; e < padded; e += kLanes) best = max(best, I32x16::load(key + e));
    return max_lanes(best);
}

/// The lowest index whose key is `wanted`, which is present.
inline int first_equal(const int32_t* key, I32x16 wanted) {
    for (int e = 0;; e += kLanes) {
        const uint32_t bits = equal_bits(I32x16::load(key + e), wanted);
        if (bits != 0) return e + __builtin_ctz(bits);
    }
}

/// Replaces one key where it lies, by a whole vector: the next load of it need not wait.
inline I32x16 replace(int32_t* key, int index, I32x16 value) {
    int32_t* block = key + index / kLanes * kLanes;
    const I32x16 replaced = with_lane(I32x16::load(block), index % kLanes, value);
    replaced.store(block);
    return replaced;
}

inline F32x16 load_first_bf16(const uint16_t* p, int count) {
    uint16_t tail[kLanes] = {};
    for (int i = 0; i < count; ++i) tail[i] = p[i];
    return F32x16::load_bf16(tail);
}

/// Fills row.logit, NaN as -inf and -inf past the last expert, and row.key with their order.
/// Returns the largest logit.
inline float load_logits(const TopkRoutingArgs& args, int64_t token, RouteRow& row) {
    const int num_experts = args.num_experts, whole = num_experts / kLanes * kLanes;
    const int64_t start = token * args.logits_stride;
    const F32x16 lowest = F32x16::broadcast(-kInfinity);
    I32x16 best = I32x16::broadcast(kTakenKey);
    const auto keep = [&](int e, F32x16 x) {
        x = select(is_nan(x), lowest, x);
        const I32x16 key = order_key(x);
        best = max(best, key);
        x.store(row.logit + e);
        key.store(row.key + e);
    };
    const auto keep_rest = [&](F32x16 x) {  // the lanes past the last expert lose every tie
        keep(whole, float_of_bits(first_lanes(num_experts - whole, bits_of(x), bits_of(lowest))));
    };
    if (args.logits_dtype == DType::kBFloat16) {
        const uint16_t* source = static_cast<const uint16_t*>(args.router_logits) + start;
        for (int e = 0; e < whole; e += kLanes) keep(e, F32x16::load_bf16(source + e));
        if (whole < num_experts) keep_rest(load_first_bf16(source + whole, num_experts - whole));
    } else {
        const float* source = static_cast<const float*>(args.router_logits) + start;
        for (int e = 0; e < whole; e += kLanes) keep(e, F32x16::load(source + e));
        if (whole < num_experts) keep_rest(F32x16::load_first(source + whole, num_experts - whole));
    }
    return float_of_key(first_lane(max_lanes(best)));
}

/// Scores of `padded` logits; those of softmax are not yet divided by their sum.
inline void compute_scores(ScoreFunction function, const float* logits, int padded, float row_max,
                           float* scores) {
    const F32x16 shift = F32x16::broadcast(row_max);
    const auto each = [&](auto&& score) {
        for (int e = 0; e < padded; e += kLanes) score(F32x16::load(logits + e)).store(scores + e);
    };
    switch (function) {
        case ScoreFunction::kSigmoid:
            return each([](F32x16 x) { return sigmoid(x); });
        case ScoreFunction::kSqrtSoftplus:
            return each([](F32x16 x) { return sqrt_softplus(x); });
        case ScoreFunction::kRawLogits:
        case ScoreFunction::kSoftmax:
            return each([&](F32x16 x) { return exp(sub(x, shift)); });
    }
}

/// Divides a row of softmax by its sum over all experts.
inline void divide_by_sum(float* score, int padded) {
    float partial[kSumLanes] = {};
    F32x16 low = F32x16::broadcast(0.0f), high = low;
    for (int e = 0; e < padded; e += kSumLanes) {
        low = add(low, F32x16::load(score + e));
        if (e + kLanes < padded) high = add(high, F32x16::load(score + e + kLanes));
    }
    low.store(partial);
    high.store(partial + kLanes);
    for (int half = kSumLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
    const F32x16 sum = F32x16::broadcast(partial[0]);
    for (int e = 0; e < padded; e += kLanes) div(F32x16::load(score + e), sum).store(score + e);
}

/// The two largest keys of one group.
struct TopTwo {
    int32_t best, second;
};

inline TopTwo top_two(const int32_t* key, int size) {
    if (size % kLanes != 0) {
        TopTwo top{kTakenKey, kTakenKey};
        for (int e = 0; e < size; ++e) {
            const int32_t smaller = key[e] < top.best ? key[e] : top.best;
            top.best = key[e] > top.best ? key[e] : top.best;
            top.second = smaller > top.second ? smaller : top.second;
        }
        return top;
    }
    I32x16 best = I32x16::load(key), second = I32x16::broadcast(kTakenKey);
    for (int e = kLanes; e < size; e += kLanes) {
        const I32x16 x = I32x16::load(key + e);
        second = max(second, min(best, x));
        best = max(best, x);
    }
    const I32x16 top = max_lanes(best);
    const int lane = __builtin_ctz(equal_bits(best, top));
    best = with_lane(best, lane, I32x16::broadcast(kTakenKey));
    return {first_lane(top), first_lane(max_lanes(max(second, best)))};
}

/// Drops the groups outside the topk_group best: their keys become kDroppedKey.
inline void limit_groups(const TopkRoutingArgs& args, RouteRow& row) {
    const RoutingConfig& config = args.config;
    const int size = args.num_experts / config.num_groups;
    const bool add_second = config.group_limit == GroupLimit::kTop2Sum && size > 1;
    alignas(64) float group_score[kMaxExperts];
    alignas(64) int32_t group_key[kMaxExperts];
    const int padded = padded_to_lanes(config.num_groups);
    for (int g = 0; g < config.num_groups; ++g) {
        const TopTwo top = top_two(row.key + g * size, size);
        group_score[g] = float_of_key(top.best) + (add_second ? float_of_key(top.second) : 0.0f);
    }
    for (int g = config.num_groups; g < padded; ++g) group_score[g] = 0.0f;
    for (int g = 0; g < padded; g += kLanes)
        order_key(F32x16::load(group_score + g)).store(group_key + g);
    for (int g = config.num_groups; g < padded; ++g) group_key[g] = kTakenKey;
    const I32x16 taken = I32x16::broadcast(kTakenKey);
    for (int i = 0; i < config.topk_group; ++i)
        replace(group_key, first_equal(group_key, largest(group_key, padded)), taken);
    for (int g = 0; g < config.num_groups; ++g) {
        if (group_key[g] == kTakenKey) continue;
        for (int e = g * size; e < (g + 1) * size; ++e) row.key[e] = kDroppedKey;
    }
}

/// The top_k largest keys, ties to the lower expert. Of each sixteen keys only the largest takes
/// part until it is chosen.
inline void select_experts(int padded, int top_k, RouteRow& row, int32_t* ids) {
    const I32x16 taken = I32x16::broadcast(kTakenKey);
    if (padded == kLanes) {
        I32x16 keys = I32x16::load(row.key);
        for (int j = 0; j < top_k; ++j) {
            ids[j] = __builtin_ctz(equal_bits(keys, max_lanes(keys)));
            keys = with_lane(keys, ids[j], taken);
        }
        return;
    }
    const int blocks = padded / kLanes, padded_blocks = padded_to_lanes(blocks);
    for (int b = 0; b < blocks; ++b)
        row.block_key[b] = first_lane(max_lanes(I32x16::load(row.key + b * kLanes)));
    for (int b = blocks; b < padded_blocks; ++b) row.block_key[b] = kTakenKey;
    if (blocks <= kLanes) {
        I32x16 tops = I32x16::load(row.block_key);
        for (int j = 0; j < top_k; ++j) {
            const I32x16 value = max_lanes(tops);
            const int block = __builtin_ctz(equal_bits(tops, value));
            const I32x16 keys = I32x16::load(row.key + block * kLanes);
            const int lane = __builtin_ctz(equal_bits(keys, value));
            ids[j] = block * kLanes + lane;
            const I32x16 rest = with_lane(keys, lane, taken);
            rest.store(row.key + block * kLanes);
            tops = with_lane(tops, block, max_lanes(rest));
        }
        return;
    }
    for (int j = 0; j < top_k; ++j) {
        const I32x16 value = largest(row.block_key, padded_blocks);
        const int block = first_equal(row.block_key, value);
        const int expert = block * kLanes + first_equal(row.key + block * kLanes, value);
        ids[j] = expert;
        const I32x16 rest = replace(row.key, expert, taken);
        replace(row.block_key, block, max_lanes(rest));
    }
}

/// Orders the experts by their scores, or logits, plus the bias.
inline void key_choices(const TopkRoutingArgs& args, RouteRow& row) {
    const float* base = args.choose_on_scores() ? row.score : row.logit;
    const float* bias = args.selection_bias;
    const I32x16 taken = I32x16::broadcast(kTakenKey);
    for (int e = 0; e < args.num_experts; e += kLanes) {
        const int left = args.num_experts - e;
        F32x16 choice = F32x16::load(base + e);
        if (bias != nullptr)
            choice = add(choice, left >= kLanes ? F32x16::load(bias + e)
                                                : F32x16::load_first(bias + e, left));
        const I32x16 key = order_key(choice);
        (left >= kLanes ? key : first_lanes(left, key, taken)).store(row.key + e);
    }
}

inline void route_token(const TopkRoutingArgs& args, int64_t token, RouteRow& row) {
    const RoutingConfig& config = args.config;
    const int top_k = config.top_k;
    const int padded = padded_to_lanes(args.num_experts);

    // 1. Load, and find the largest logit.
    const float row_max = load_logits(args, token, row);

    // 2. Score every expert where the choice or the sum needs it, or they are few; else only the
    //    chosen ones.
    const bool score_all = args.choose_on_scores() || args.divide_softmax() || padded <= 2 * kLanes;
    if (score_all) {
        compute_scores(config.score_function, row.logit, padded, row_max, row.score);
        if (args.divide_softmax()) divide_by_sum(row.score, padded);
    }

    // 3. What the choice is made on, if not the logits.
    if (args.choose_on_scores() || args.selection_bias != nullptr) key_choices(args, row);

    // 4. Select.
    if (config.group_limit != GroupLimit::kNone && config.topk_group < config.num_groups)
        limit_groups(args, row);
    int32_t* ids = args.topk_ids + token * top_k;
    float* weights = args.topk_weights + token * top_k;
    select_experts(padded, top_k, row, ids);
    if (score_all) {
        for (int j = 0; j < top_k; ++j) weights[j] = row.score[ids[j]];
    } else {
        alignas(64) float chosen[padded_to_lanes(kMaxTopK)] = {};
        for (int j = 0; j < top_k; ++j) chosen[j] = row.logit[ids[j]];
        compute_scores(config.score_function, chosen, padded_to_lanes(top_k), row_max, row.score);
        for (int j = 0; j < top_k; ++j) weights[j] = row.score[j];
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
