#pragma once

// The kernel: every warp loads, multiplies, activates and stores.

#include "common/launch.cuh"
#include "grouped_gemm/sm80_epilogue.cuh"
#include "grouped_gemm/sm80_loader.cuh"

namespace moecore::cuda::sm80 {

/// Of a warp: [16 weight rows][8 rows][element, as multiply_add has them].
template <typename Shape>
using Sums = float[Shape::kWeightTiles][2 * Shape::kTokenTiles][4];

/// Where the products are in the ring.
struct ReadPlace {
    uint32_t ring;
    int stage = 0;

    __device__ uint32_t address(const Params& params) const {
        return ring + stage * params.stage_bytes;
    }
    __device__ void advance(int num_stages) { stage = stage + 1 == num_stages ? 0 : stage + 1; }
};

/// Waits for the next K block and starts to copy another into `used`, the stage of the one before
/// it. REQUIRES: this warp has loaded all fragments of that one.
template <typename Shape, typename Load>
__device__ __forceinline__ void take_block(Load& loader, int used) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();  // all threads' copies have arrived, and the stage before is used
    loader.copy(used);
    commit_copies();
}

/// What a warp multiplies in one step of 16 along K.
template <typename Shape, int kTokenTiles>
struct Fragments {
    uint32_t weights[Shape::kWeightTiles][4];
    uint32_t rows[kTokenTiles][4];

    /// `stage`: address of the K block. Offsets are those of this lane's row and first piece.
    __device__ __forceinline__ void load(uint32_t stage, uint32_t weight_offset,
                                         uint32_t row_offset, int step) {
        constexpr uint32_t kTileBytes = 16 * 2 * Shape::BLOCK_K;
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n)
            load_matrices(rows[n],
                          stage + (row_offset ^ step * 32) + n * Shape::kTokenWarps * kTileBytes);
#pragma unroll
        for (int m = 0; m < Shape::kWeightTiles; ++m)
            load_matrices(weights[m], stage + (weight_offset ^ step * 32) + m * kTileBytes);
    }
    __device__ __forceinline__ void multiply(Sums<Shape>& sums) const {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
            for (int m = 0; m < Shape::kWeightTiles; ++m) {
                multiply_add(sums[m][2 * n], weights[m], rows[n][0], rows[n][1]);
                multiply_add(sums[m][2 * n + 1], weights[m], rows[n][2], rows[n][3]);
            }
    }
};

/// sums += this warp's weight rows @ kTokenTiles times 16 rows of input, over all of K. The first K
/// block has been taken; so has, afterwards, that of the next tile.
template <typename Shape, int kTokenTiles, typename Load>
__device__ __forceinline__ void multiply(const Params& params, Load& loader, ReadPlace& place,
                                         Sums<Shape>& sums) {
    constexpr int kSteps = Shape::BLOCK_K / 16;
    static_assert(kSteps % 2 == 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    // Matrices of weights: rows 0 to 7 and 8 to 15, then the next eight of K. Of rows: the two
    // eights of K, then rows 8 to 15.
    const uint32_t weight_offset = piece_offset<Shape>(
        warp % Shape::kWeightWarps * 16 * Shape::kWeightTiles + lane % 16, lane / 16);
    const uint32_t row_offset = piece_offset<Shape>(
        Shape::kWeightRows + warp / Shape::kWeightWarps * 16 + lane % 8 + lane / 16 * 8,
        lane / 8 % 2);
    Fragments<Shape, kTokenTiles> fragments[2];
    fragments[0].load(place.address(params), weight_offset, row_offset, 0);
    for (int k = 0; k < params.num_k_blocks; ++k) {
        // Fragments are on their way while the ones before are multiplied. The last are those of
        // the next tile, which loads its own.
#pragma unroll
        for (int step = 0; step < kSteps - 1; ++step) {
            fragments[(step + 1) % 2].load(place.address(params), weight_offset, row_offset,
                                           step + 1);
            fragments[step % 2].multiply(sums);
        }
        const int used = place.stage;
        place.advance(Shape::kStages);
        take_block<Shape>(loader, used);
        fragments[0].load(place.address(params), weight_offset, row_offset, 0);
        fragments[1].multiply(sums);
        loader.advance(used);
    }
}

/// With as many tiles of 16 rows a warp as `num_rows` need.
template <typename Shape, int kTokenTiles, typename Load>
__device__ __forceinline__ void multiply_rows(const Params& params, Load& loader, ReadPlace& place,
                                              int num_rows, Sums<Shape>& sums) {
    if constexpr (kTokenTiles < Shape::kTokenTiles) {
        if (num_rows > kTokenTiles * Shape::kTokenStep)
            return multiply_rows<Shape, kTokenTiles + 1>(params, loader, place, num_rows, sums);
    }
    multiply<Shape, kTokenTiles>(params, loader, place, sums);
}

template <Activation kActivation, typename Shape>
__device__ void store(const Params& params, const Tile& tile, const Sums<Shape>& sums) {
    constexpr bool kIsGated = kActivation != Activation::kNone;
    const GroupedGemmArgs& args = params.args;
    const Place<kIsGated, Shape> place(tile);
    float bias[Shape::kWeightTiles][2];
#pragma unroll
    for (int m = 0; m < Shape::kWeightTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            bias[m][half] = bias_of<kIsGated>(
                args, tile.group,
                place.first_column + (kIsGated ? m : 2 * m + half) * 8 + place.lane / 4, half);
    const auto value = [&](int piece, int eight, int i) {
        const auto sum = [&](int m, int half) {
            return __fadd_rn(sums[m][eight][half * 2 + i], bias[m][half]);
        };
        if constexpr (kIsGated)
            return Epilogue<kActivation>(args.config)(sum(piece, 0), sum(piece, 1));
        else
            return sum(piece / 2, piece % 2);
    };
    if (args.output_dtype == DType::kBFloat16)
        store_bfloat16<kIsGated, Shape>(params, tile, place, value);
    else
        store_float32<kIsGated, Shape>(args, tile, place, value);
}

template <Activation kActivation, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResidentBlocks)
    grouped_gemm_kernel(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ Shared<Shape> shared;
    wait_for_predecessors();
    allow_dependents();

    // 1. Fill all stages but one.
    Loader<kActivation != Activation::kNone, Shape> loader(params, shared, shared_address(ring));
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
        loader.copy(stage);
        commit_copies();
        loader.advance(stage);
        __syncthreads();  // the loader's calls are apart
    }

    // 2. Tile after tile; the loader is ahead.
    ReadPlace place{shared_address(ring)};
    take_block<Shape>(loader, Shape::kStages - 1);
    loader.advance(Shape::kStages - 1);
    while (true) {
        const Tile tile = shared.tile[place.stage];
        if (tile.group < 0) return;
        Sums<Shape> sums = {};
        multiply_rows<Shape, 1>(params, loader, place, tile.num_rows, sums);
        store<kActivation, Shape>(params, tile, sums);
    }
}

}  // namespace moecore::cuda::sm80
