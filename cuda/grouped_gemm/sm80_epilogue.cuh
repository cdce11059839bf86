#pragma once

// From a warp's sums to output on sm_80: rounding, and 16-byte stores of the rows that exist.
// Weights are the first operand, so sums come transposed: a thread holds one or two features of
// many rows.

#include <cuda_bf16.h>

#include "grouped_gemm/epilogue.cuh"
#include "grouped_gemm/sm80_loader.cuh"

namespace moecore::cuda::sm80 {

/// threadIdx.x, read here: what follows from it shall not wait in registers while sums are made.
__device__ inline int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

/// Where a warp's sums belong. Its pieces are eight neighbouring columns each: of one half of the
/// 16 weight rows of a product, gated of both halves.
template <bool kIsGated, typename Shape>
struct Place {
    static constexpr int kHalves = kIsGated ? 1 : 2;
    static constexpr int kNumPieces = kHalves * Shape::kWeightTiles;

    __device__ explicit Place(const Tile& tile) {
        const int thread = thread_index(), warp = thread / kWarpSize;
        lane = thread % kWarpSize;
        token_warp = warp / Shape::kWeightWarps;
        first_column =
            (tile.weight_tile * Shape::kWeightWarps + warp % Shape::kWeightWarps) * kNumPieces * 8;
    }

    /// The first row of the tile in eight number `eight`. Warps have 16 rows in turn.
    __device__ int row(int eight) const {
        return (eight / 2 * Shape::kTokenWarps + token_warp) * 16 + eight % 2 * 8;
    }

    int lane, token_warp, first_column;
};

/// Lane q of four holds word q of each of four pieces, and gets all words of piece q.
__device__ inline uint4 gather_piece(const uint32_t* word, int lane) {
    const auto swap = [&](uint32_t& low, uint32_t& high, int distance) {
        const bool is_upper = lane & distance;
        const uint32_t other = __shfl_xor_sync(kFullMask, is_upper ? low : high, distance);
        (is_upper ? low : high) = other;
    };
    uint4 piece{word[0], word[1], word[2], word[3]};
    swap(piece.x, piece.y, 1);
    swap(piece.z, piece.w, 1);
    swap(piece.x, piece.z, 2);
    swap(piece.y, piece.w, 2);
    return piece;
}

/// Rounds to bfloat16 and stores. value(piece, eight, i) is that of a lane's row lane % 4 * 2 + i
/// of the eight, and of the piece's column lane / 4.
template <bool kIsGated, typename Shape, typename Value>
__device__ void store_bfloat16(const Params& params, const Tile& tile,
                               const Place<kIsGated, Shape>& place, Value&& value) {
    constexpr int kNumPieces = Place<kIsGated, Shape>::kNumPieces;
    const GroupedGemmArgs& args = params.args;
    const int num_columns = static_cast<int>(kIsGated ? args.n / 2 : args.n);
    const int quarter = place.lane % 4;
#pragma unroll
    for (int eight = 0; eight < 2 * Shape::kTokenTiles; ++eight) {
        const int row = place.row(eight) + place.lane / 4;
        if (place.row(eight) >= tile.num_rows) break;
        uint32_t word[kNumPieces];
#pragma unroll
        for (int piece = 0; piece < kNumPieces; ++piece)
            word[piece] = transpose(pack_bfloat16(value(piece, eight, 0), value(piece, eight, 1)));
        // A lane now has two neighbouring columns of one row.
        const int columns_left = row < tile.num_rows ? num_columns - place.first_column : 0;
        __nv_bfloat16* target =
            output_row<kIsGated, __nv_bfloat16>(
                args, tile.first_row + (row < tile.num_rows ? row : place.row(eight))) +
            place.first_column;
        if (kNumPieces % 4 == 0 && params.is_output_aligned) {
#pragma unroll
            for (int first = 0; first + 4 <= kNumPieces; first += 4) {
                const uint4 whole = gather_piece(word + first, place.lane);
                const int column = (first + quarter) * 8;
                if (column < columns_left) *reinterpret_cast<uint4*>(target + column) = whole;
            }
            continue;
        }
#pragma unroll
        for (int piece = 0; piece < kNumPieces; ++piece) {
            const int column = piece * 8 + quarter * 2;
            if (column >= columns_left) continue;
            if (params.is_output_aligned) {
                *reinterpret_cast<uint32_t*>(target + column) = word[piece];
            } else {
                const auto* elements = reinterpret_cast<const __nv_bfloat16*>(&word[piece]);
                target[column] = elements[0];
                target[column + 1] = elements[1];
            }
        }
    }
}

/// Stores float32 sums as they are: eight lanes make 32 neighbouring bytes.
template <bool kIsGated, typename Shape, typename Value>
__device__ void store_float32(const GroupedGemmArgs& args, const Tile& tile,
                              const Place<kIsGated, Shape>& place, Value&& value) {
    const int num_columns = static_cast<int>(kIsGated ? args.n / 2 : args.n);
#pragma unroll
    for (int eight = 0; eight < 2 * Shape::kTokenTiles; ++eight) {
        if (place.row(eight) >= tile.num_rows) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = place.row(eight) + place.lane % 4 * 2 + i;
            if (row >= tile.num_rows) continue;
            float* target = output_row<kIsGated, float>(args, tile.first_row + row);
#pragma unroll
            for (int piece = 0; piece < Place<kIsGated, Shape>::kNumPieces; ++piece) {
                const int column = place.first_column + piece * 8 + place.lane / 4;
                if (column < num_columns) target[column] = value(piece, eight, i);
            }
        }
    }
}

}  // namespace moecore::cuda::sm80
