#pragma once

// What the thin kernel takes, and how its sums become output: bias, rounding, and 16-byte stores.

#include <cuda_bf16.h>

#include "common/ptx_sm90.cuh"
#include "grouped_gemm/sm90_epilogue.cuh"
#include "grouped_gemm/thin_config.hpp"

namespace moecore::cuda::sm90 {

constexpr int kThinThreads = kGroupThreads + kWarpSize;  ///< consumers, then the producer
constexpr int kThinMaxTokens = 128;

/// wgmma reads 64 weight rows whatever a tile has; the sums of what follows them are dropped.
constexpr int kWgmmaBytes = 64 * kRowBytes;

struct ThinParams {
    GroupedGemmArgs args;
    ThinConfig config;
    int stage_bytes;  ///< stage_depth times weights, then stage_depth times rows of input
    int num_k_blocks;
    bool is_output_aligned;
    bool are_weights_shared;  ///< by several tiles of rows
};

/// Where a warp's sums belong: it has 16 of the tile's weight rows. Gated, these are eight of gate
/// and the same eight of up, and make eight columns.
template <bool kIsGated>
struct ThinPlace {
    static constexpr int kColumns = kIsGated ? 8 : 16;  ///< of a warp

    __device__ ThinPlace(const ThinParams& params, int warp)
        : first_column((static_cast<int>(blockIdx.x) * (params.config.weight_rows / 16) + warp) *
                       kColumns),
          first_row(static_cast<int>(blockIdx.y) * params.config.max_tokens),
          num_rows(
              min(params.config.max_tokens, static_cast<int>(params.args.num_rows) - first_row)) {}

    int first_column, first_row, num_rows;
};

template <bool kIsGated>
__device__ void thin_bias(const GroupedGemmArgs& args, int first_column, int lane,
                          float (&bias)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t column = first_column + lane / 4 + (kIsGated ? 0 : half * 8);
        bias[half] = bias_of<kIsGated>(args, 0, column, half);
    }
}

/// Rounds to bfloat16 and stores a warp's columns, 16 bytes a thread, through `staging`: 4 KiB of
/// this warp alone. value(half, eight, i) is that of a lane's row 8 * eight + lane % 4 * 2 + i.
template <bool kIsGated, typename Value>
__device__ void thin_store_bfloat16(const ThinParams& params, const ThinPlace<kIsGated>& place,
                                    uint32_t staging, int lane, Value&& value) {
    constexpr int kPieces = ThinPlace<kIsGated>::kColumns / 8;  // of 16 bytes, in a row
    const GroupedGemmArgs& args = params.args;
    const int num_columns = static_cast<int>(kIsGated ? args.n / 2 : args.n);
    // Equal pieces of eight neighbouring rows lie in different banks.
    const auto piece_address = [&](int row, int piece) {
        return staging + (row * kPieces + (kIsGated ? 0 : piece ^ (row / 4 % 2))) * 16;
    };
#pragma unroll
    for (int part = 0; part < kThinMaxTokens / 32; ++part) {
        if (part * 32 >= place.num_rows) break;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            uint32_t fragment[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                fragment[i] =
                    pack_bfloat16(value(piece, part * 4 + i, 0), value(piece, part * 4 + i, 1));
            ptx::store_transposed(piece_address(part * 32 + lane, piece), fragment);
        }
    }
    __syncwarp();  // every piece is there
    for (int i = lane; i < place.num_rows * kPieces; i += kWarpSize) {
        const int row = i / kPieces, piece = i % kPieces;
        const int column = place.first_column + piece * 8;
        if (column >= num_columns) continue;
        const uint4 data = ptx::load_shared(piece_address(row, piece));
        __nv_bfloat16* target = static_cast<__nv_bfloat16*>(args.output) +
                                (place.first_row + row) * args.output_stride + column;
        if (params.is_output_aligned) {
            *reinterpret_cast<uint4*>(target) = data;
        } else {
            const auto* elements = reinterpret_cast<const __nv_bfloat16*>(&data);
#pragma unroll
            for (int e = 0; e < 8; ++e) target[e] = elements[e];
        }
    }
}

/// Stores float32 as it is: eight lanes make 32 neighbouring bytes.
template <bool kIsGated, typename Value>
__device__ void thin_store_float32(const ThinParams& params, const ThinPlace<kIsGated>& place,
                                   int lane, Value&& value) {
    const GroupedGemmArgs& args = params.args;
    const int64_t num_columns = kIsGated ? args.n / 2 : args.n;
#pragma unroll
    for (int eight = 0; eight < kThinMaxTokens / 8; ++eight) {
        if (eight * 8 >= place.num_rows) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = eight * 8 + lane % 4 * 2 + i;
            if (row >= place.num_rows) continue;
            float* target =
                static_cast<float*>(args.output) + (place.first_row + row) * args.output_stride;
#pragma unroll
            for (int half = 0; half < (kIsGated ? 1 : 2); ++half) {
                const int column = place.first_column + half * 8 + lane / 4;
                if (column < num_columns) target[column] = value(half, eight, i);
            }
        }
    }
}

}  // namespace moecore::cuda::sm90
