#pragma once

// One step of attention by one warp: 16 rows and 64 positions, on tensor cores.

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
template <int kD, int kWarps>
__device__ void copy_block(const KvCacheArgs& cache, int64_t place, int index, int head,
                           int context, __nv_bfloat16* key, __nv_bfloat16* value) {
    constexpr int kChunks = kD / 8;
    const int64_t base =
        (max(place, int64_t{0}) * cache.num_kv_heads + head) * kBlock * cache.head_dim;
    const auto* keys = static_cast<const __nv_bfloat16*>(cache.key) + base;
    const auto* values = static_cast<const __nv_bfloat16*>(cache.value) + base;
    const uint32_t to_key = shared_address(key), to_value = shared_address(value);
    for (int i = threadIdx.x; i < kBlock * kChunks; i += kWarps * kWarpSize) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool exists =
            place >= 0 && index * kBlock + row < context && chunk * 8 < cache.head_dim;
        const int64_t offset = exists ? row * cache.head_dim + chunk * 8 : 0;
        copy_async(to_key + chunk_offset<kD>(row, chunk), keys + offset, exists);
        copy_async(to_value + chunk_offset<kD>(row, chunk), values + offset, exists);
    }
}

/// A warp's 16 rows in the middle of a split. Lane l holds rows l / 4 and l / 4 + 8.
template <int kD>
struct Accumulator {
    float output[kD / 8][4] = {};
    float max[2], sum[2] = {};  ///< sum: over this lane's columns only

    __device__ Accumulator() { max[0] = max[1] = minus_infinity(); }
};

/// One step: scores of 64 positions, their weights, weighted values.
template <int kD>
__device__ void attend(uint32_t query, uint32_t key, uint32_t value, float scale, int lane,
                       int first_position, const int (&position)[2], Accumulator<kD>& acc) {
    // 1. Scores.
    float score[kBlock / 8][4] = {};
    const int matrix_row = lane % 8, matrix = lane / 8;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
        uint32_t a[4];
        load_matrices(a, query + chunk_offset<kD>(matrix_row + matrix % 2 * 8, 2 * k + matrix / 2));
#pragma unroll
        for (int n = 0; n < kBlock / 16; ++n) {
            uint32_t b[4];
            load_matrices(b, key + chunk_offset<kD>(n * 16 + matrix / 2 * 8 + matrix_row,
                                                    2 * k + matrix % 2));
            multiply_add(score[2 * n], a, b[0], b[1]);
            multiply_add(score[2 * n + 1], a, b[2], b[3]);
        }
    }

    // 2. Weights, by the running maximum.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = acc.max[half];
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& s = score[n][2 * half + i];
                const int column = first_position + n * 8 + lane % 4 * 2 + i;
                s = column <= position[half] ? s * scale : minus_infinity();
                largest = fmaxf(largest, s);
            }
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
        // A row that has seen nothing yet keeps weights of 0, not NaN.
        const float base = largest == minus_infinity() ? 0.0f : largest;
        const float fade = exp2_fast(acc.max[half] - base);
        acc.max[half] = largest;
        acc.sum[half] *= fade;
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
            acc.output[d][2 * half] *= fade;
            acc.output[d][2 * half + 1] *= fade;
        }
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& s = score[n][2 * half + i];
                s = exp2_fast(s - base);
                acc.sum[half] += s;
            }
    }

    // 3. Weighted values.
#pragma unroll
    for (int k = 0; k < kBlock / 16; ++k) {
        const uint32_t a[4] = {pack_bfloat16(score[2 * k][0], score[2 * k][1]),
                               pack_bfloat16(score[2 * k][2], score[2 * k][3]),
                               pack_bfloat16(score[2 * k + 1][0], score[2 * k + 1][1]),
                               pack_bfloat16(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
        for (int d = 0; d < kD / 16; ++d) {
            uint32_t b[4];
            load_matrices_transposed(
                b,
                value + chunk_offset<kD>(k * 16 + matrix % 2 * 8 + matrix_row, 2 * d + matrix / 2));
            multiply_add(acc.output[2 * d], a, b[0], b[1]);
            multiply_add(acc.output[2 * d + 1], a, b[2], b[3]);
        }
    }
}

}  // namespace moecore::cuda
