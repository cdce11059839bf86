// Fused score + choice + weights of a router: one warp a token, one pass over memory.
//
//   reads   T * E * sizeof(logit) bytes    router_logits [T, E]; selection_bias [E] from cache
//   writes  T * k * 8 bytes                topk_ids, topk_weights [T, k]
//
// Lane l owns experts l, l + 32, l + 64, ... in registers, so that a warp's loads are contiguous.
// The k winners come from k rounds of warp-wide argmax. Every float32 operation and its order are
// those of cpu/kernels/route.hpp: same ids, same bits of weights. Needs sm_80 (__reduce_max_sync).

#include <cuda_bf16.h>

#include <climits>
#include <cstdint>
#include <utility>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "moecore/kernels/topk_routing.hpp"

namespace moecore::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kFullMask = 0xffffffffu;

// Below the key of every float. A dropped expert is chosen only after all others.
constexpr int32_t kTakenKey = INT32_MIN;
constexpr int32_t kDroppedKey = INT32_MIN + 1;

__device__ float infinity() { return __uint_as_float(0x7f800000u); }

/// Order-preserving map of floats to int32; -0 equals +0, NaN counts as -inf.
__device__ int32_t order_key(float x) {
    const float ordered = x != x ? -infinity() : __fadd_rn(x, 0.0f);  // -0 + 0 is +0
    const int32_t bits = __float_as_int(ordered);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

/// The inverse for keys of floats: the same bits, but for -0 and NaN.
__device__ float from_order_key(int32_t key) {
    return __int_as_float(key ^ (key >> 31 & 0x7fffffff));
}

/// Marks the largest key of the warp as taken, the lowest index i * 32 + lane among equals, and
/// returns that index.
template <int kPerLane>
__device__ int take_largest(int32_t (&key)[kPerLane], int lane) {
    int32_t best = key[0];
    int index = lane;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
        if (key[i] > best) {  // strict: within a lane, a tie stays with the lower index
            best = key[i];
            index = i * kWarpSize + lane;
        }
    }
    const int32_t winner_key = __reduce_max_sync(kFullMask, best);
    const int winner = __reduce_min_sync(kFullMask, best == winner_key ? index : INT_MAX);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
        if (i * kWarpSize + lane == winner) key[i] = kTakenKey;
    return winner;
}

/// Scores of this lane's experts from their logits. `divide_softmax` as in TopkRoutingArgs.
template <int kPerLane>
__device__ void compute_scores(const RoutingConfig& config, bool divide_softmax, float row_max,
                               const float (&logit)[kPerLane], float (&score)[kPerLane]) {
    switch (config.score_function) {
        case ScoreFunction::kSigmoid:
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) score[i] = sigmoid(logit[i]);
            return;
        case ScoreFunction::kSqrtSoftplus:
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) score[i] = sqrt_softplus(logit[i]);
            return;
        case ScoreFunction::kSoftmax:
        case ScoreFunction::kRawLogits:
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) score[i] = exp(__fsub_rn(logit[i], row_max));
            break;
    }
    if (!divide_softmax) return;
    // One partial sum a lane, then halves: lanes past E hold exp(-inf) = 0. Addition commutes, so
    // the butterfly leaves the CPU's sum in every lane.
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum = __fadd_rn(sum, score[i]);
    for (int half = kWarpSize / 2; half > 0; half /= 2)
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullMask, sum, half));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) score[i] = __fdiv_rn(score[i], sum);
}

/// Score of group `g`: the largest, or the sum of the two largest, of its experts' choice scores.
__device__ float group_score(const int32_t* expert_key, int g, int size, GroupLimit limit) {
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
    for (int n = 0; n < config.topk_group; ++n) take_largest(group_key, lane);

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

template <int kPerLane, typename Logit>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    topk_routing_kernel(const __grid_constant__ TopkRoutingArgs args, const bool choose_on_scores,
                        const bool divide_softmax) {
    __shared__ int32_t shared_key[kWarpsPerBlock][kPerLane * kWarpSize];
    const RoutingConfig& config = args.config;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + warp;
    if (token >= args.num_tokens) return;  // a whole warp leaves, so the warp-wide calls stay full

    // 1. Load, and find the largest logit. NaN counts as -inf, and so do lanes past E.
    const Logit* row = static_cast<const Logit*>(args.router_logits) + token * args.logits_stride;
    float logit[kPerLane];
    int32_t largest = kTakenKey;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int expert = i * kWarpSize + lane;
        const float x = expert < args.num_experts ? to_float(row[expert]) : -infinity();
        logit[i] = x != x ? -infinity() : x;
        largest = max(largest, order_key(logit[i]));
    }
    const float row_max = from_order_key(__reduce_max_sync(kFullMask, largest));

    // 2. Score every expert.
    float score[kPerLane];
    compute_scores(config, divide_softmax, row_max, logit, score);

    // 3. What the choice is made on.
    int32_t key[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int expert = i * kWarpSize + lane;
        key[i] = kTakenKey;
        if (expert < args.num_experts) {
            float choice = choose_on_scores ? score[i] : logit[i];
            if (args.selection_bias != nullptr)
                choice = __fadd_rn(choice, args.selection_bias[expert]);
            key[i] = order_key(choice);
        }
    }

    // 4. Select. Lane j keeps the j-th winner; every lane adds the winners' scores in order.
    if (config.group_limit != GroupLimit::kNone && config.topk_group < config.num_groups)
        limit_groups(config, args.num_experts, lane, shared_key[warp], key);
    int chosen_expert = 0;
    float chosen_score = 0.0f;
    float sum = 0.0f;
    for (int j = 0; j < config.top_k; ++j) {
        const int winner = take_largest(key, lane);
        float winner_score = 0.0f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            if (i * kWarpSize + lane == winner) winner_score = score[i];
        winner_score = __shfl_sync(kFullMask, winner_score, winner % kWarpSize);
        sum = __fadd_rn(sum, winner_score);
        if (lane == j) {
            chosen_expert = winner;
            chosen_score = winner_score;
        }
    }

    // 5. Weigh and store.
    const bool is_raw = config.score_function == ScoreFunction::kRawLogits;
    const bool is_exponential = is_raw || config.score_function == ScoreFunction::kSoftmax;
    const bool undefined = row_max == -infinity() || (is_exponential && row_max == infinity());
    float divisor = 1.0f;
    if (is_raw) {
        divisor = sum;
    } else if (config.renormalize) {
        divisor = __fadd_rn(sum, config.norm_epsilon);
        divisor = divisor < config.norm_min ? config.norm_min : divisor;
    }
    const float weight = __fmul_rn(__fdiv_rn(chosen_score, divisor), config.scale);
    if (lane < config.top_k) {
        args.topk_ids[token * config.top_k + lane] = chosen_expert;
        args.topk_weights[token * config.top_k + lane] =
            undefined ? __uint_as_float(0x7fc00000u) : weight;
    }
}

template <typename Logit>
bool launch(const TopkRoutingArgs& args, Stream stream) {
    const int64_t blocks = ceil_div(args.num_tokens, kWarpsPerBlock);
    return dispatch_at_least(
        ceil_div(args.num_experts, kWarpSize), std::integer_sequence<int, 1, 2, 4, 8, 16, 32>{},
        [&](auto per_lane) {
            topk_routing_kernel<per_lane(), Logit>
                <<<static_cast<unsigned>(blocks), kWarpsPerBlock * kWarpSize, 0, native(stream)>>>(
                    args, args.choose_on_scores(), args.divide_softmax());
        });
}

}  // namespace

void topk_routing(const TopkRoutingArgs& args, Stream stream) {
    if (args.num_tokens == 0) return;  // a grid of 0 blocks is a launch error
    const bool launched = args.logits_dtype == DType::kBFloat16
                              ? launch<__nv_bfloat16>(args, stream)
                              : launch<float>(args, stream);
    if (!launched) throw UnsupportedError("topk_routing: more than 1024 experts");
    check(cudaPeekAtLastError(), "topk_routing launch");
}

}  // namespace moecore::cuda
