#pragma once

// From a tile's sums to output: bias, activation, rounding, and whole 16-byte stores of the rows
// that exist. Weights are the first operand, so sums come transposed: a thread holds one or two
// features of many rows.

#include <cuda_bf16.h>

#include "common/mma_sm80.cuh"
#include "grouped_gemm/epilogue.cuh"
#include "grouped_gemm/sm90_stages.cuh"

namespace moecore::cuda::sm90 {

/// Where a thread's sums belong.
template <bool kIsGated, typename Shape>
struct Place {
    static constexpr int kColumns = (kIsGated ? 32 : 64) * Shape::kBlocks;  ///< of a warpgroup

    __device__ Place(const Tile& tile, int consumer)
        : warp(threadIdx.x / kWarpSize % 4),
          lane(threadIdx.x % kWarpSize),
          first_column((tile.weight_tile * Shape::kConsumers + consumer) * kColumns) {}

    /// The output column that sums of block `block` and half `half` (rows 0 to 7 of a warp's 16
    /// weight rows, or 8 to 15) go to. Both halves of a gated tile make one column.
    __device__ int column(int block, int half) const {
        return first_column +
               (kIsGated ? block * 32 + warp * 8 : block * 64 + warp * 16 + half * 8) + lane / 4;
    }

    int warp, lane;
    int first_column;
};

template <bool kIsGated, typename Shape>
__device__ void load_bias(const GroupedGemmArgs& args, const Tile& tile,
                          const Place<kIsGated, Shape>& place, float (&bias)[Shape::kBlocks][2]) {
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bias[block][half] =
                bias_of<kIsGated>(args, tile.group, place.column(block, half), half);
        }
    }
}

/// Rounds to bfloat16 and stores through `staging`, memory of this warpgroup alone: 128 bytes for
/// each of its kBlocks * 64 weight rows. Its two halves take turns, so that a warp may fill one
/// while another still reads the other. Rows of output take 16-byte stores.
template <bool kIsGated, typename Shape, typename Value>
__device__ void store_bfloat16(const Params& params, const Tile& tile,
                               const Place<kIsGated, Shape>& place, uint32_t staging, int consumer,
                               Value&& value) {
    constexpr int kColumns = Place<kIsGated, Shape>::kColumns;
    constexpr int kPieces = kColumns / 8;  // of 16 bytes, in a row
    constexpr int kRound = kIsGated ? 64 : 32;
    constexpr int kRounds = ceil_div(Shape::kMaxTokens, kRound);
    constexpr int kHalfBytes = Shape::kBlocks * 64 * kRowBytes / 2;
    static_assert(kRound * kColumns * 2 == kHalfBytes);
    // 16 bytes of eight neighbouring rows lie in different banks.
    const auto piece_address = [&](int half, int row, int piece) {
        const int swizzled = piece ^ (kPieces >= 8 ? row % 8 : row / 2 % 4);
        return staging + half * kHalfBytes + (row * kPieces + swizzled) * 16;
    };
    const GroupedGemmArgs& args = params.args;
    const int num_columns = static_cast<int>(kIsGated ? args.n / 2 : args.n);
    const int thread = threadIdx.x % kGroupThreads;
    const int column = place.first_column + thread % kPieces * 8;
    const uint32_t mine = piece_address(0, place.lane, kIsGated ? place.warp : place.warp * 2);

#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        if (round * kRound >= tile.num_rows) break;
        // 1. Fill one half: 32 rows at a time, eight columns of each.
#pragma unroll
        for (int part = 0; part < kRound / 32; ++part) {
            const int row = round * kRound + part * 32;
            if (row >= tile.num_rows) break;
#pragma unroll
            for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
                for (int half = 0; half < (kIsGated ? 1 : 2); ++half) {
                    uint32_t fragment[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        fragment[i] = pack_bfloat16(value(block, half, row / 8 + i, 0),
                                                    value(block, half, row / 8 + i, 1));
                    // Bits of the piece that neither warp nor swizzle has.
                    const int piece = kIsGated ? block * 4 : block * 8 + half;
                    ptx::store_transposed(
                        (mine ^ piece * 16) + round % 2 * kHalfBytes + part * 32 * kPieces * 16,
                        fragment);
                }
            }
        }
        ptx::named_barrier(1 + consumer, kGroupThreads);  // the half is full

        // 2. Store it, 16 bytes a thread.
#pragma unroll 2
        for (int i = 0; i < kRound * kPieces / kGroupThreads; ++i) {
            const int row = i * (kGroupThreads / kPieces) + thread / kPieces;
            const int tile_row = round * kRound + row;
            if (tile_row >= tile.num_rows || column >= num_columns) continue;
            __nv_bfloat16* target =
                output_row<kIsGated, __nv_bfloat16>(args, tile.first_row + tile_row) + column;
            *reinterpret_cast<uint4*>(target) =
                ptx::load_shared(piece_address(round % 2, row, thread % kPieces));
        }
    }
}

/// Stores sums one by one, as T: eight lanes make neighbouring elements.
template <typename T, bool kIsGated, typename Shape, typename Value>
__device__ void store_elements(const GroupedGemmArgs& args, const Tile& tile,
                               const Place<kIsGated, Shape>& place, Value&& value) {
    const int num_columns = static_cast<int>(kIsGated ? args.n / 2 : args.n);
#pragma unroll
    for (int eight = 0; eight < Shape::kMaxTokens / 8; ++eight) {
        if (eight * 8 >= tile.num_rows) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = eight * 8 + place.lane % 4 * 2 + i;
            if (row >= tile.num_rows) continue;
            T* target = output_row<kIsGated, T>(args, tile.first_row + row);
#pragma unroll
            for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
                for (int half = 0; half < (kIsGated ? 1 : 2); ++half) {
                    const int column = place.column(block, half);
                    if (column < num_columns)
                        target[column] = static_cast<T>(value(block, half, eight, i));
                }
            }
        }
    }
}

}  // namespace moecore::cuda::sm90
