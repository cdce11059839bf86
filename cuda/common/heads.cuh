#pragma once

// Norm and rotary position embedding of one head by a warp. Every operation and its order are those
// of rms_norm.cu and rotary_embedding.cu: lane l holds the partial sums l and l + 32 of the norm.

#include <cstdint>

#include "common/math.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/norm_and_rotate.hpp"

namespace moecore::cuda {

inline constexpr int64_t kMaxHeadWidth = 256;  ///< eight elements a lane

/// What a lane needs of a norm's weight: columns lane, lane + 32, ...
template <int kPerLane>
struct HeadWeights {
    float weight[kPerLane];

    template <typename Weight>
    __device__ void load(const RmsNormArgs& norm, int lane) {
        const Weight* weights = static_cast<const Weight*>(norm.weight);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int column = i * kWarpSize + lane;
            weight[i] = column < norm.width ? to_float(weights[column]) : 0.0f;
        }
    }
};

/// The angles of a lane's pairs: lane, lane + 32, ...
template <int kPerLane>
struct HeadAngles {
    float cosine[kPerLane / 2], sine[kPerLane / 2];

    /// A position outside the table must not read past it; NaN makes the mistake visible.
    __device__ void load(const RotaryEmbeddingArgs& rotary, int64_t token, int lane) {
        const int half = static_cast<int>(rotary.rotary_dim / 2);
        const int64_t position = rotary.positions[token];
        const bool is_row = position >= 0 && position < rotary.num_positions;
        const float* cosines = rotary.cos_sin + (is_row ? position * rotary.cos_sin_stride : 0);
        const float nan = __uint_as_float(0x7fc00000u);
#pragma unroll
        for (int i = 0; i < kPerLane / 2; ++i) {
            const int pair = i * kWarpSize + lane;
            cosine[i] = is_row && pair < half ? cosines[pair] : nan;
            sine[i] = is_row && pair < half ? cosines[half + pair] : nan;
        }
    }
};

/// Sum of rms_norm's 64 partial sums, in every lane: 64 to 16, then halves.
__device__ inline float head_norm_sum(float partial, float partial_32) {
    const float low = __fadd_rn(partial, __shfl_down_sync(kFullMask, partial, 16));
    const float high = __fadd_rn(partial_32, __shfl_down_sync(kFullMask, partial_32, 16));
    float sum = __fadd_rn(low, high);
    for (int step = 8; step > 0; step /= 2)
        sum = __fadd_rn(sum, __shfl_down_sync(kFullMask, sum, step, 16));
    return __shfl_sync(kFullMask, sum, 0);
}

/// values[column] = the normalised row.
template <typename Element, int kPerLane>
__device__ void normalise_head(const RmsNormArgs& norm, const HeadWeights<kPerLane>& weights,
                               const Element* row, int lane, float* values) {
    float x[kPerLane];
    float partial[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int column = i * kWarpSize + lane;
        x[i] = column < norm.width ? to_float(row[column]) : 0.0f;
        if (column < norm.width) partial[i % 2] = __fmaf_rn(x[i], x[i], partial[i % 2]);
    }
    const float sum = head_norm_sum(partial[0], partial[1]);
    const float mean = __fdiv_rn(sum, static_cast<float>(norm.width));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, norm.eps)));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int column = i * kWarpSize + lane;
        if (column >= norm.width) continue;
        const Element rounded = from_float<Element>(__fmul_rn(x[i], scale));
        values[column] =
            to_float(from_float<Element>(__fmul_rn(weights.weight[i], to_float(rounded))));
    }
}

/// target = values, the first rotary_dim of which turn. REQUIRES: a __syncwarp() since `values`
/// were written.
template <typename Element, int kPerLane>
__device__ void turn_head(const RotaryEmbeddingArgs& rotary, const HeadAngles<kPerLane>& angles,
                          const float* values, int width, int lane, Element* target) {
    const int half = static_cast<int>(rotary.rotary_dim / 2);
    const bool interleaved = rotary.pairs == RotaryPairs::kInterleaved;
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i) {
        const int pair = i * kWarpSize + lane;
        if (pair >= half) continue;
        const int first = interleaved ? 2 * pair : pair;
        const int second = interleaved ? 2 * pair + 1 : pair + half;
        const float a = values[first], b = values[second];
        const float cosine = angles.cosine[i], sine = angles.sine[i];
        const float minus_sine = __fsub_rn(0.0f, sine);
        target[first] = from_float<Element>(__fmaf_rn(a, cosine, __fmul_rn(b, minus_sine)));
        target[second] = from_float<Element>(__fmaf_rn(b, cosine, __fmul_rn(a, sine)));
    }
    for (int column = 2 * half + lane; column < width; column += kWarpSize)
        target[column] = from_float<Element>(values[column]);
}

}  // namespace moecore::cuda
