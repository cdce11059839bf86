#pragma once

// One step of attention, 16 rows and 64 positions, on tensor cores: by one warp or by four.

#include <cuda_bf16.h>

#include <cstdint>

#include "common/mma_sm80.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/kv_cache.hpp"
#include "moecore/kv_cache.hpp"

namespace moecore::cuda {

inline constexpr int kBlock = kKvBlockSize;  ///< positions of a step
inline constexpr int kWarpRows = 16;

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

/// Where the 16 bytes number `chunk` of a row lie among its tile in shared memory: rows are kD
/// elements apart, and their chunks permuted so that eight rows' equal chunks meet no bank twice.
template <int kD>
__device__ uint32_t chunk_offset(int row, int chunk) {
    return static_cast<uint32_t>((row * (kD / 8) + (chunk ^ (row & 7))) * 16);
}

/// Starts the copies of block `index` of the sequence. Positions past `context` become zeros.
template <int kD, int kThreads>
__device__ void copy_block(const KvCacheArgs& cache, int64_t place, int index, int head,
                           int context, __nv_bfloat16* key, __nv_bfloat16* value) {
    constexpr int kChunks = kD / 8;
    const int64_t base =
        (head * cache.num_blocks + max(place, int64_t{0})) * kBlock * cache.head_dim;
    const auto* keys = static_cast<const __nv_bfloat16*>(cache.key) + base;
    const auto* values = static_cast<const __nv_bfloat16*>(cache.value) + base;
    const uint32_t to_key = shared_address(key), to_value = shared_address(value);
    for (int i = threadIdx.x; i < kBlock * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool exists =
            place >= 0 && index * kBlock + row < context && chunk * 8 < cache.head_dim;
        const int64_t offset = exists ? row * cache.head_dim + chunk * 8 : 0;
        copy_async(to_key + chunk_offset<kD>(row, chunk), keys + offset, exists);
        copy_async(to_value + chunk_offset<kD>(row, chunk), values + offset, exists);
    }
}

/// Sixteen rows in the middle of a split, by one warp. Lane l holds rows l / 4 and l / 4 + 8.
/// kWidth: columns of the output. Sums of weights are kept apart for each quarter of a step's
/// positions, so that four warps with a quarter each have the same sums as one with all.
template <int kWidth, int kQuarters>
struct Accumulator {
    float output[kWidth / 8][4] = {};
    float max[2];
    float sum[2][kQuarters] = {};  ///< over this lane's positions only

    __device__ Accumulator() { max[0] = max[1] = minus_infinity(); }
};

/// Scores of the rows with positions 16 * first .. 16 * (first + kCount) - 1 of a step: element
/// [n][2 * half + i] is that of row `half`, position 8 * (2 * first + n) + l % 4 * 2 + i.
template <int kD, int kCount>
__device__ void multiply_keys(uint32_t query, uint32_t key, int first, int lane,
                              float (&score)[2 * kCount][4]) {
    const int matrix_row = lane % 8, matrix = lane / 8;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
        uint32_t a[4];
        load_matrices(a, query + chunk_offset<kD>(matrix_row + matrix % 2 * 8, 2 * k + matrix / 2));
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            uint32_t b[4];
            const int row = (first + n) * 16 + matrix / 2 * 8 + matrix_row;
            load_matrices(b, key + chunk_offset<kD>(row, 2 * k + matrix % 2));
            multiply_add(score[2 * n], a, b[0], b[1]);
            multiply_add(score[2 * n + 1], a, b[2], b[3]);
        }
    }
}

/// Scales the scores, hides those after the row's position, and returns the largest of row `half`.
/// `column` is the position of this lane's first score.
template <int kScores>
__device__ float mask_scores(float (&score)[kScores][4], int half, float scale, int column,
                             int position) {
    float largest = minus_infinity();
#pragma unroll
    for (int n = 0; n < kScores; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& s = score[n][2 * half + i];
            s = column + n * 8 + i <= position ? s * scale : minus_infinity();
            largest = fmaxf(largest, s);
        }
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
}

/// Turns the scores of row `half` into weights by the new maximum, and lets what was so far fade.
template <int kWidth, int kQuarters>
__device__ void weigh_scores(float (&score)[4 * kQuarters / 2][4], int half, float largest,
                             Accumulator<kWidth, kQuarters>& acc) {
    largest = fmaxf(acc.max[half], largest);
    // A row that has seen nothing yet keeps weights of 0, not NaN.
    const float base = largest == minus_infinity() ? 0.0f : largest;
    const float fade = exp2_fast(acc.max[half] - base);
    acc.max[half] = largest;
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
        acc.output[d][2 * half] *= fade;
        acc.output[d][2 * half + 1] *= fade;
    }
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
        float& sum = acc.sum[half][quarter];
        sum *= fade;
#pragma unroll
        for (int n = 2 * quarter; n < 2 * quarter + 2; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& s = score[n][2 * half + i];
                s = exp2_fast(s - base);
                sum += s;
            }
    }
}

/// Adds 16 weighted positions, number k of the step, to the columns from 8 * first_chunk on.
template <int kD, int kWidth, int kQuarters>
__device__ void add_values(const uint32_t (&weights)[4], uint32_t value, int k, int first_chunk,
                           int lane, Accumulator<kWidth, kQuarters>& acc) {
    const int row = k * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
        uint32_t b[4];
        load_matrices_transposed(b, value + chunk_offset<kD>(row, first_chunk + 2 * d + lane / 16));
        multiply_add(acc.output[2 * d], weights, b[0], b[1]);
        multiply_add(acc.output[2 * d + 1], weights, b[2], b[3]);
    }
}

/// One step of one warp's rows: 64 positions from `first_position` on.
template <int kD>
__device__ void attend(uint32_t query, uint32_t key, uint32_t value, float scale, int lane,
                       int first_position, const int (&position)[2], Accumulator<kD, 4>& acc) {
    float score[8][4] = {};
    multiply_keys<kD, 4>(query, key, 0, lane, score);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float largest =
            mask_scores(score, half, scale, first_position + lane % 4 * 2, position[half]);
        weigh_scores(score, half, largest, acc);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t weights[4] = {pack_bfloat16(score[2 * k][0], score[2 * k][1]),
                                     pack_bfloat16(score[2 * k][2], score[2 * k][3]),
                                     pack_bfloat16(score[2 * k + 1][0], score[2 * k + 1][1]),
                                     pack_bfloat16(score[2 * k + 1][2], score[2 * k + 1][3])};
        add_values<kD>(weights, value, k, 0, lane, acc);
    }
}

/// What four warps pass each other in a step.
struct SharedStep {
    __nv_bfloat16 weights[kWarpRows * kBlock];
    float max[4][kWarpRows];
};

/// The same step of 16 rows by four warps: a quarter of the positions each for the scores, a
/// quarter of the columns for the values. Every number is computed as in attend().
template <int kD>
__device__ void attend_together(uint32_t query, uint32_t key, uint32_t value, float scale, int lane,
                                int warp, int first_position, const int (&position)[2],
                                SharedStep& shared, Accumulator<kD / 4, 1>& acc) {
    float score[2][4] = {};
    multiply_keys<kD, 1>(query, key, warp, lane, score);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = first_position + warp * 16 + lane % 4 * 2;
        const float largest = mask_scores(score, half, scale, column, position[half]);
        if (lane % 4 == 0) shared.max[warp][half * 8 + lane / 4] = largest;
    }
    __syncthreads();  // every quarter's maxima are there
    const uint32_t weights = shared_address(shared.weights);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4;
        const float largest = fmaxf(fmaxf(shared.max[0][row], shared.max[1][row]),
                                    fmaxf(shared.max[2][row], shared.max[3][row]));
        weigh_scores(score, half, largest, acc);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const uint32_t pair = pack_bfloat16(score[n][2 * half], score[n][2 * half + 1]);
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(
                             weights + chunk_offset<kBlock>(row, 2 * warp + n) + lane % 4 * 4),
                         "r"(pair)
                         : "memory");
        }
    }
    __syncthreads();  // every weight is there
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        load_matrices(
            a, weights + chunk_offset<kBlock>(lane / 8 % 2 * 8 + lane % 8, 2 * k + lane / 16));
        add_values<kD>(a, value, k, warp * (kD / 32), lane, acc);
    }
}

}  // namespace moecore::cuda
