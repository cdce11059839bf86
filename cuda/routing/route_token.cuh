#pragma once

// One token's routing by one warp.
//
// Lane l owns experts l, l + 32, l + 64, ... in registers, so that a warp's loads are contiguous.
// The k winners come from k rounds of warp-wide argmax. Every float32 operation and its order are
// those of cpu/kernels/route.hpp: same ids, same bits of weights. Needs sm_80 (__reduce_max_sync).

#include <cuda_bf16.h>

#include <climits>
#include <cstdint>

#include "common/math.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/topk_routing.hpp"

namespace moecore::cuda {

// Below the key of every float. A dropped expert is chosen only after all others.
inline constexpr int32_t kTakenKey = INT32_MIN;
inline constexpr int32_t kDroppedKey = INT32_MIN + 1;

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

/// Order-preserving map of floats to int32; -0 equals +0, NaN counts as -inf.
__device__ inline int32_t order_key(float x) {
    const float ordered = x != x ? -infinity() : __fadd_rn(x, 0.0f);  // -0 + 0 is +0
    const int32_t bits = __float_as_int(ordered);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

/// The inverse for keys of floats: the same bits, but for -0 and NaN.
__device__ inline float from_order_key(int32_t key) {
    return __int_as_float(key ^ (key >> 31 & 0x7fffffff));
}

/// Marks the largest key of the warp as taken, the lowest index i * 32 + lane among equals, and
/// returns that index; `winner_key` becomes the key.
template <int kPerLane>
__device__ int take_largest(int32_t (&key)[kPerLane], int lane, int32_t& winner_key) {
    int32_t best = key[0];
    int index = lane;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
        if (key[i] > best) {  // strict: within a lane, a tie stays with the lower index
            best = key[i];
            index = i * kWarpSize + lane;
        }
    }
    winner_key = __reduce_max_sync(kFullMask, best);
    const int winner = __reduce_min_sync(kFullMask, best == winner_key ? index : INT_MAX);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
        if (i * kWarpSize + lane == winner) key[i] = kTakenKey;
    return winner;
}

/// Score of one logit. Softmax and raw logits: not yet divided by a sum.
__device__ inline float score_of(ScoreFunction function, float logit, float row_max) {
    switch (function) {
        case ScoreFunction::kSigmoid:
            return sigmoid(logit);
        case ScoreFunction::kSqrtSoftplus:
            return sqrt_softplus(logit);
        case ScoreFunction::kSoftmax:
        case ScoreFunction::kRawLogits:
            break;
    }
    return exp(__fsub_rn(logit, row_max));
}

/// Sum of all experts' exp(logit - row_max): one partial sum a lane, then halves. Lanes past E hold
/// -inf and add exp(-inf) = 0. Addition commutes, so the butterfly leaves the CPU's sum everywhere.
template <int kPerLane>
__device__ float softmax_sum(const int32_t (&logit_key)[kPerLane], float row_max) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
        sum = __fadd_rn(sum, exp(__fsub_rn(from_order_key(logit_key[i]), row_max)));
    for (int half = kWarpSize / 2; half > 0; half /= 2)
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullMask, sum, half));
    return sum;
}

/// Score of group `g`: the largest, or the sum of the two largest, of its experts' choice scores.
__device__ inline float group_score(const int32_t* expert_key, int g, int size, GroupLimit limit) {
    float best = -infinity(), second = -infinity();
    for (int e = g * size; e < (g + 1) * size; ++e) {
        const float x = from_order_key(expert_key[e]);
        if (x > best) {
            second = best;
            best = x;
        } else if (x > second) {
            second = x;
        }
    }
    return limit == GroupLimit::kTop2Sum && size > 1 ? __fadd_rn(best, second) : best;
}

/// Drops the groups outside the topk_group best: their experts' keys become kDroppedKey. Lane l
/// ranks groups l, l + 32, ...; `shared_key` [E] is this warp's own, for what crosses lanes.
template <int kPerLane>
__device__ void limit_groups(const RoutingConfig& config, int num_experts, int lane,
                             int32_t* shared_key, int32_t (&key)[kPerLane]) {
    const int size = num_experts / config.num_groups;

    // 1. Score every group.
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) shared_key[i * kWarpSize + lane] = key[i];
    __syncwarp();  // every expert's key is there
    int32_t group_key[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int g = i * kWarpSize + lane;
        group_key[i] = g < config.num_groups
                           ? order_key(group_score(shared_key, g, size, config.group_limit))
                           : kTakenKey;
    }

    // 2. Take the best ones.
    for (int n = 0; n < config.topk_group; ++n) {
        int32_t ignored = 0;
        take_largest(group_key, lane, ignored);
    }

    // 3. Drop the experts of the others.
    __syncwarp();  // every lane has read the experts' keys, which the groups' overwrite
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) shared_key[i * kWarpSize + lane] = group_key[i];
    __syncwarp();  // every group's key is there
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int expert = i * kWarpSize + lane;
        if (expert < num_experts && shared_key[expert / size] != kTakenKey) key[i] = kDroppedKey;
    }
}

/// limit_groups for groups of a multiple of 32 experts: whole registers of the warp, so that maxima
/// of the warp are those of a group, and no memory is needed. Lane g ranks group g.
template <int kPerLane>
__device__ void limit_wide_groups(const RoutingConfig& config, int num_experts, int lane,
                                  int32_t (&key)[kPerLane]) {
    const int registers = num_experts / config.num_groups / kWarpSize;  // of a group
    int32_t group_key[1] = {kTakenKey};
    int32_t best = kTakenKey, second = kTakenKey;
    int group = 0, left = registers;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        second = max(second, min(best, key[i]));
        best = max(best, key[i]);
        if (--left > 0) continue;
        const int32_t largest = __reduce_max_sync(kFullMask, best);
        float score = from_order_key(largest);
        if (config.group_limit == GroupLimit::kTop2Sum) {
            const int owner =
                __ffs(static_cast<int>(__ballot_sync(kFullMask, best == largest))) - 1;
            const int32_t next = __reduce_max_sync(kFullMask, lane == owner ? second : best);
            score = __fadd_rn(score, from_order_key(next));
        }
        if (lane == group && group < config.num_groups) group_key[0] = order_key(score);
        best = second = kTakenKey;
        ++group;
        left = registers;
    }
    for (int n = 0; n < config.topk_group; ++n) {
        int32_t ignored = 0;
        take_largest(group_key, lane, ignored);
    }
    group = 0;
    left = registers;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const bool is_kept = __shfl_sync(kFullMask, group_key[0], group) == kTakenKey;
        if (i * kWarpSize < num_experts && !is_kept) key[i] = kDroppedKey;
        if (--left > 0) continue;
        ++group;
        left = registers;
    }
}

/// What route_token chose: lane j < k holds the j-th best expert, the other lanes nothing.
struct Choice {
    int expert;
    float weight;
};

/// Routes one token with the whole warp. `scratch` [2, 32 * kPerLane] is this warp's own shared
/// memory. `choose_on_scores` and `divide_softmax` as in TopkRoutingArgs.
template <int kPerLane, typename Logit>
__device__ Choice route_token(const TopkRoutingArgs& args, int64_t token, int lane,
                              bool choose_on_scores, bool divide_softmax, int32_t* scratch) {
    const RoutingConfig& config = args.config;
    float* scores = reinterpret_cast<float*>(scratch);  // [E]; only if the choice is made on them
    int32_t* shared_key = scratch + kPerLane * kWarpSize;

    // 1. Load, and find the largest logit. NaN counts as -inf, and so do lanes past E.
    const Logit* row = static_cast<const Logit*>(args.router_logits) + token * args.logits_stride;
    int32_t key[kPerLane];
    int32_t largest = kTakenKey;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int expert = i * kWarpSize + lane;
        key[i] = order_key(expert < args.num_experts ? to_float(row[expert]) : -infinity());
        largest = max(largest, key[i]);
    }
    const float row_max = from_order_key(__reduce_max_sync(kFullMask, largest));
    const float divisor_of_all = divide_softmax ? softmax_sum(key, row_max) : 1.0f;
    const auto score = [&](int32_t logit_key) {
        const float s = score_of(config.score_function, from_order_key(logit_key), row_max);
        return divide_softmax ? __fdiv_rn(s, divisor_of_all) : s;
    };

    // 2. What the choice is made on: the logits, unless their scores or a bias change the order.
    //    Then a winner's key does not give its score back, and the scores wait in shared memory.
    const bool keys_are_logits = !choose_on_scores && args.selection_bias == nullptr;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int expert = i * kWarpSize + lane;
        if (!keys_are_logits && expert < args.num_experts) {
            const float own_score = score(key[i]);
            scores[expert] = own_score;
            float choice = choose_on_scores ? own_score : from_order_key(key[i]);
            if (args.selection_bias != nullptr)
                choice = __fadd_rn(choice, args.selection_bias[expert]);
            key[i] = order_key(choice);
        }
        if (expert >= args.num_experts) key[i] = kTakenKey;
    }

    // 3. Select. Lane j keeps the j-th winner.
    if (config.group_limit != GroupLimit::kNone && config.topk_group < config.num_groups) {
        if (args.num_experts / config.num_groups % kWarpSize == 0)
            limit_wide_groups(config, args.num_experts, lane, key);
        else
            limit_groups(config, args.num_experts, lane, shared_key, key);
    }
    __syncwarp();  // every expert's score is there
    int chosen_expert = 0;
    int32_t chosen_key = kTakenKey;
    for (int j = 0; j < config.top_k; ++j) {
        int32_t winner_key = 0;
        const int winner = take_largest(key, lane, winner_key);
        if (lane == j) {
            chosen_expert = winner;
            chosen_key = winner_key;
        }
    }

    // 4. Weigh. Every lane adds the winners' scores in order.
    const float chosen_score = keys_are_logits ? score(chosen_key) : scores[chosen_expert];
    const bool is_raw = config.score_function == ScoreFunction::kRawLogits;
    float divisor = 1.0f;
    if (is_raw || config.renormalize) {
        float sum = 0.0f;
        for (int j = 0; j < config.top_k; ++j)
            sum = __fadd_rn(sum, __shfl_sync(kFullMask, chosen_score, j));
        divisor = sum;
        if (!is_raw) {
            divisor = __fadd_rn(sum, config.norm_epsilon);
            divisor = divisor < config.norm_min ? config.norm_min : divisor;
        }
    }
    __syncwarp();  // every lane has read the scores, which the warp's next token overwrites
    const bool is_exponential = is_raw || config.score_function == ScoreFunction::kSoftmax;
    const bool undefined = row_max == -infinity() || (is_exponential && row_max == infinity());
    const float weight = __fmul_rn(__fdiv_rn(chosen_score, divisor), config.scale);
    return {chosen_expert, undefined ? __uint_as_float(0x7fc00000u) : weight};
}

}  // namespace moecore::cuda
