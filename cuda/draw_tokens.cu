// One token of each row of logits.
//
//   reads   N * V * 4 bytes of logits, once for greedy rows, else up to three times, then from L2
//   writes  N * 16 bytes, to the host's memory
//
// A cluster of eight blocks takes a row, each warp one contiguous range of it. Largest logit, then
// integer weights: they have one sum in any order, so the token is the CPU's. Parameters and tokens
// lie in pinned memory that kernels reach themselves: copies would cost more than the work. Needs
// sm_80; before sm_90, which has no clusters, one block a row.

#include <algorithm>
#include <climits>
#include <cstdint>

#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/draw_tokens.hpp"

namespace moecore::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kMaxBlocks = 8;
constexpr float kWeightOfLikeliest = 0x1p40f;

__device__ float minus_infinity() { return __uint_as_float(0xff800000u); }

/// The largest logit so far and the first token that has it; `poison` is a NaN that was met, or 0.
struct Best {
    float value = minus_infinity();
    int token = INT_MAX;
    float poison = 0.0f;

    __device__ void add(float other_value, int other_token, float other_poison) {
        if (other_value > value || (other_value == value && other_token < token)) {
            value = other_value;
            token = other_token;
        }
        if (other_poison != 0.0f) poison = other_poison;
    }
};

/// What the blocks of a cluster show each other.
struct Shared {
    float value[kWarps], poison[kWarps];
    int token[kWarps];
    unsigned sum_low[kWarps], sum_high[kWarps];
    DrawParams params;
};

/// One warp's range of a row.
struct Range {
    const float* logits;
    int begin, end;
};

__device__ Best find_best(const Range& range, int lane) {
    Best best;
#pragma unroll 8
    for (int i = range.begin + lane; i < range.end; i += kWarpSize) {
        const float x = range.logits[i];
        if (x != x)
            best.poison = x;
        else
            best.add(x, i, 0.0f);
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        best.add(__shfl_xor_sync(kFullMask, best.value, distance),
                 __shfl_xor_sync(kFullMask, best.token, distance),
                 __shfl_xor_sync(kFullMask, best.poison, distance));
    return best;
}

__device__ int64_t weight_of(float x, float maximum, const DrawParams& params) {
    const float likelihood = exp(__fdiv_rn(__fsub_rn(x, maximum), params.temperature));
    const float kept = likelihood < params.min_p ? 0.0f : likelihood;
    return static_cast<int64_t>(__fmul_rn(kept, kWeightOfLikeliest));
}

__device__ int64_t sum_weights(const Range& range, int lane, float maximum,
                               const DrawParams& params) {
    int64_t sum = 0;
#pragma unroll 4
    for (int i = range.begin + lane; i < range.end; i += kWarpSize)
        sum += weight_of(range.logits[i], maximum, params);
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(kFullMask, sum, distance);
    return sum;
}

/// The first token of the range with which `sum` and the weights up to it exceed `target`.
__device__ int find_token(const Range& range, int lane, float maximum, const DrawParams& params,
                          int64_t sum, int64_t target) {
    for (int first = range.begin; first < range.end; first += kWarpSize) {
        const int i = first + lane;
        int64_t up_to_here =
            i < range.end ? weight_of(range.logits[i], maximum, params) : int64_t{0};
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const int64_t below = __shfl_up_sync(kFullMask, up_to_here, distance);
            if (lane >= distance) up_to_here += below;
        }
        const unsigned found = __ballot_sync(kFullMask, sum + up_to_here > target);
        if (found != 0) return first + __ffs(static_cast<int>(found)) - 1;
        sum += __shfl_sync(kFullMask, up_to_here, kWarpSize - 1);
    }
    return range.end - 1;
}

__global__ void __launch_bounds__(kWarps* kWarpSize)
    draw_tokens_kernel(const __grid_constant__ DrawTokensArgs args) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int num_blocks = static_cast<int>(cluster_size());
    const int block = static_cast<int>(cluster_rank());
    const int64_t row = blockIdx.y;
    const int vocab_size = static_cast<int>(args.vocab_size);
    const int width = ceil_div(ceil_div(vocab_size, num_blocks * kWarps), kWarpSize) * kWarpSize;
    const int begin = min((block * kWarps + warp) * width, vocab_size);
    const Range range = {args.logits + row * args.logits_stride, begin,
                         min(begin + width, vocab_size)};
    if (threadIdx.x == 0) shared.params = args.params[row];
    wait_for_predecessors();
    allow_dependents();

    // 1. The largest logit of the row, in every thread.
    const Best own = find_best(range, lane);
    if (lane == 0) {
        shared.value[warp] = own.value;
        shared.token[warp] = own.token;
        shared.poison[warp] = own.poison;
    }
    cluster_sync();  // every warp's best is there, and the row's parameters
    const DrawParams params = shared.params;
    Best best;
    for (int i = lane; i < num_blocks * kWarps; i += kWarpSize)
        best.add(load_from_cluster(&shared.value[i % kWarps], i / kWarps),
                 load_from_cluster(&shared.token[i % kWarps], i / kWarps),
                 load_from_cluster(&shared.poison[i % kWarps], i / kWarps));
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        best.add(__shfl_xor_sync(kFullMask, best.value, distance),
                 __shfl_xor_sync(kFullMask, best.token, distance),
                 __shfl_xor_sync(kFullMask, best.poison, distance));
    const float maximum = best.poison != 0.0f ? best.poison : best.value;
    const bool is_finite = fabsf(maximum) < __uint_as_float(0x7f800000u);
    if (!is_finite || params.temperature == 0.0f) {
        if (block == 0 && threadIdx.x == 0)
            args.tokens[row] = {is_finite ? best.token : 0, maximum};
        cluster_sync();  // nobody reads this block's memory any more
        return;
    }

    // 2. Where the noise falls among the running sum of weights: the warp that finds it in its
    //    range looks for the token.
    const int64_t own_sum = sum_weights(range, lane, maximum, params);
    if (lane == 0) {
        shared.sum_low[warp] = static_cast<unsigned>(own_sum);
        shared.sum_high[warp] = static_cast<unsigned>(own_sum >> 32);
    }
    cluster_sync();  // every warp's sum is there
    int64_t total = 0, lower = 0;
    for (int i = lane; i < num_blocks * kWarps; i += kWarpSize) {
        const int64_t sum = int64_t{load_from_cluster(&shared.sum_low[i % kWarps], i / kWarps)} |
                            int64_t{load_from_cluster(&shared.sum_high[i % kWarps], i / kWarps)}
                                << 32;
        total += sum;
        lower += i < block * kWarps + warp ? sum : 0;
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        total += __shfl_xor_sync(kFullMask, total, distance);
        lower += __shfl_xor_sync(kFullMask, lower, distance);
    }
    const auto point = static_cast<int64_t>(__dmul_rn(static_cast<double>(total), params.noise));
    const int64_t target = point < total ? point : total - 1;
    if (lower <= target && target < lower + own_sum) {
        const int token = find_token(range, lane, maximum, params, lower, target);
        if (lane == 0) args.tokens[row] = {token, maximum};
    }
    cluster_sync();  // nobody reads this block's memory any more
}

}  // namespace

void draw_tokens(const DrawTokensArgs& args, Stream stream) {
    if (args.num_rows == 0) return;  // a grid of 0 blocks is a launch error
    thread_local PinnedBuffer buffer;
    const auto num_rows = static_cast<size_t>(args.num_rows);
    auto* tokens = static_cast<DrawnToken*>(
        buffer.reserve(num_rows * (sizeof(DrawnToken) + sizeof(DrawParams))));
    auto* params = reinterpret_cast<DrawParams*>(tokens + num_rows);
    std::copy_n(args.params, num_rows, params);
    DrawTokensArgs pinned = args;
    pinned.params = params;
    pinned.tokens = tokens;
    const unsigned cluster = is_sm90() ? kMaxBlocks : 1;
    launch_dependent_clusters("draw_tokens", draw_tokens_kernel,
                              dim3(cluster, static_cast<unsigned>(args.num_rows)),
                              dim3(kWarps * kWarpSize), cluster, 0, stream, pinned);
    check(cudaStreamSynchronize(native(stream)), "draw_tokens");
    std::copy_n(tokens, num_rows, args.tokens);
}

}  // namespace moecore::cuda
