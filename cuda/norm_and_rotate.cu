// Norm and rotary position embedding of query and key heads, in place.
//
//   reads   T * n * D * sizeof(element) bytes of heads, T * rotary_dim * 4 of cos_sin
//   writes  T * n * D * sizeof(element) bytes of heads
//
// One warp a head. Every operation and its order are those of rms_norm.cu and rotary_embedding.cu:
// lane l holds the partial sums l and l + 32 of the norm. Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/norm_and_rotate.hpp"

namespace moecore::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int64_t kMaxWidth = 256;

/// Sum of rms_norm's 64 partial sums, in every lane: 64 to 16, then halves.
__device__ float norm_sum(float partial, float partial_32) {
    const float low = __fadd_rn(partial, __shfl_down_sync(kFullMask, partial, 16));
    const float high = __fadd_rn(partial_32, __shfl_down_sync(kFullMask, partial_32, 16));
    float sum = __fadd_rn(low, high);
    for (int step = 8; step > 0; step /= 2)
        sum = __fadd_rn(sum, __shfl_down_sync(kFullMask, sum, step, 16));
    return __shfl_sync(kFullMask, sum, 0);
}

template <int kPerLane, typename Element, typename Weight>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    norm_and_rotate_kernel(const __grid_constant__ NormAndRotateArgs args) {
    __shared__ float normed[kWarpsPerBlock][kPerLane * kWarpSize];
    const RotaryEmbeddingArgs& rotary = args.rotary;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t index = int64_t{blockIdx.x} * kWarpsPerBlock + warp;
    wait_for_predecessors();
    allow_dependents();
    if (index >= rotary.num_tokens * rotary.num_heads) return;  // the whole warp
    const int64_t token = index / rotary.num_heads, head = index % rotary.num_heads;
    const RmsNormArgs& norm = head < args.query.num_heads ? args.query : args.key;
    Element* row =
        static_cast<Element*>(rotary.x) + token * rotary.token_stride + head * rotary.head_stride;

    // 1. Norm.
    const Weight* weights = static_cast<const Weight*>(norm.weight);
    float x[kPerLane], weight[kPerLane];
    float partial[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int column = i * kWarpSize + lane;
        weight[i] = column < norm.width ? to_float(weights[column]) : 0.0f;
        x[i] = column < norm.width ? to_float(row[column]) : 0.0f;
        if (column < norm.width) partial[i % 2] = __fmaf_rn(x[i], x[i], partial[i % 2]);
    }
    const float mean = __fdiv_rn(norm_sum(partial[0], partial[1]), static_cast<float>(norm.width));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, norm.eps)));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int column = i * kWarpSize + lane;
        if (column >= norm.width) continue;
        const Element rounded = from_float<Element>(__fmul_rn(x[i], scale));
        const Element y = from_float<Element>(__fmul_rn(weight[i], to_float(rounded)));
        normed[warp][column] = to_float(y);
        if (column >= rotary.rotary_dim) row[column] = y;
    }
    __syncwarp();  // the normed head is there

    // 2. Turn. A position outside the table must not read past it; NaN makes the mistake visible.
    const int half = static_cast<int>(rotary.rotary_dim / 2);
    const int64_t position = rotary.positions[token];
    const bool is_row = position >= 0 && position < rotary.num_positions;
    const float* cosines = rotary.cos_sin + (is_row ? position * rotary.cos_sin_stride : 0);
    const bool interleaved = rotary.pairs == RotaryPairs::kInterleaved;
    for (int pair = lane; pair < half; pair += kWarpSize) {
        const float nan = __uint_as_float(0x7fc00000u);
        const float cosine = is_row ? cosines[pair] : nan;
        const float sine = is_row ? cosines[half + pair] : nan;
        const int first = interleaved ? 2 * pair : pair;
        const int second = interleaved ? 2 * pair + 1 : pair + half;
        const float a = normed[warp][first], b = normed[warp][second];
        const float minus_sine = __fsub_rn(0.0f, sine);
        row[first] = from_float<Element>(__fmaf_rn(a, cosine, __fmul_rn(b, minus_sine)));
        row[second] = from_float<Element>(__fmaf_rn(b, cosine, __fmul_rn(a, sine)));
    }
}

template <typename Element, typename Weight>
void launch(const NormAndRotateArgs& args, Stream stream) {
    const int64_t num_rows = args.rotary.num_tokens * args.rotary.num_heads;
    dispatch_at_least(
        static_cast<int>(ceil_div(args.query.width, int64_t{kWarpSize})),
        std::integer_sequence<int, 2, 4, 8>{}, [&](auto per_lane) {
            launch_dependent("norm_and_rotate", norm_and_rotate_kernel<per_lane(), Element, Weight>,
                             dim3(static_cast<unsigned>(ceil_div(num_rows, kWarpsPerBlock))),
                             dim3(kWarpsPerBlock * kWarpSize), 0, stream, args);
        });
}

}  // namespace

void norm_and_rotate(const NormAndRotateArgs& args, Stream stream) {
    if (args.rotary.num_tokens * args.rotary.num_heads == 0) return;  // an empty grid is an error
    if (args.query.width > kMaxWidth) {
        rms_norm(args.query, stream);
        rms_norm(args.key, stream);
        rotary_embedding(args.rotary, stream);
    } else if (args.query.dtype == DType::kFloat32) {
        launch<float, float>(args, stream);
    } else if (args.query.weight_dtype == DType::kFloat32) {
        launch<__nv_bfloat16, float>(args, stream);
    } else {
        launch<__nv_bfloat16, __nv_bfloat16>(args, stream);
    }
}

}  // namespace moecore::cuda
