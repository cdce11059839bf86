#pragma once

// The warpgroup that fills the ring: one warp has the copy engine load weights, three gather input
// rows. Each warp walks the tiles by itself, so that weights never wait for the search of rows.

#include "grouped_gemm/sm90_stages.cuh"

namespace moecore::cuda::sm90 {

/// Loads boxes of weights, and tells consumers which tile a stage begins.
template <bool kIsGated, typename Shape>
__device__ void produce_weights(const Params& params, const CUtensorMap& map, Stage stage) {
    const bool is_leader = threadIdx.x % kWarpSize == 0;
    typename Shape::Walker walker(params.grid);
    Tile tile;
    for (int index = blockIdx.x; walker.find(index, tile); index += gridDim.x) {
        if (is_leader) {
            // Rows of a box come in eights; gated: eight of gate, the same eight of up.
            const int eights = tile.weight_tile * (Shape::kWeightRows / (kIsGated ? 16 : 8));
            for (int k = 0; k < params.num_k_blocks; ++k) {
                stage.wait_empty();
                if (k == 0) stage.tile() = tile;
                ptx::barrier_arrive_expect(stage.full(), Shape::kWeightBytes);
                const int box[5] = {k * BLOCK_K, 0, kIsGated ? 0 : eights, kIsGated ? eights : 0,
                                    tile.group};
                ptx::copy_box(stage.weights(), map, box, stage.full(), ptx::Keep::kBriefly);
                stage.advance();
            }
        }
        __syncwarp();
    }
    if (is_leader) {
        stage.wait_empty();
        stage.tile() = tile;  // there are no more
        ptx::barrier_arrive(stage.full());
    }
}

/// Gathers input rows in the layout of swizzled_tile: rows of a tile, then zeros up to a multiple
/// of kRowStep. Eight threads copy a row's 128 bytes.
template <typename Shape>
__device__ void produce_rows(const Params& params, Stage stage) {
    constexpr int kRowsPerPass = kGatherThreads / 8;
    constexpr int kRowsPerWarp = kWarpSize / 8;  // in one pass
    constexpr int kPasses = ceil_div(Shape::kMaxTokens, kRowsPerPass);
    constexpr int kPassesPerRegister = kWarpSize / kRowsPerWarp;
    constexpr int kRegisters = ceil_div(kPasses, kPassesPerRegister);
    const GroupedGemmArgs& args = params.args;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize % 4 - 1;
    const int chunk = lane % 8;
    const int stride_bytes = static_cast<int>(args.input_stride * 2);
    const int row_bytes = static_cast<int>(args.k_dim * 2);

    typename Shape::Walker walker(params.grid);
    Tile tile;
    for (int index = blockIdx.x; walker.find(index, tile); index += gridDim.x) {
        // 1. Each lane looks up one row for every eight passes; -1 reads zeros.
        int input_row[kRegisters];
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) {
            const int pass = i * kPassesPerRegister + lane / kRowsPerWarp;
            const int row = pass * kRowsPerPass + warp * kRowsPerWarp + lane % kRowsPerWarp;
            input_row[i] = -1;
            if (row >= tile.num_rows) continue;
            int64_t source = tile.first_row + row;
            if (args.sorted_slots != nullptr) {
                const int slot = args.sorted_slots[source];
                source = slot >= 0 ? slot / args.slots_per_token : -1;
            }
            if (source < args.num_input_rows) input_row[i] = static_cast<int>(source);
        }

        // 2. Copy, one K block after the other.
        const int num_rows = ceil_div(tile.num_rows, Shape::kRowStep) * Shape::kRowStep;
        const int first_row = warp * kRowsPerWarp + lane / 8;
        for (int k = 0; k < params.num_k_blocks; ++k) {
            stage.wait_empty();
            const int k_bytes = k * kRowBytes + chunk * 16;
            const bool is_past_k = k_bytes >= row_bytes;
            const uint32_t target = stage.weights() + Shape::kWeightBytes;
#pragma unroll
            for (int i = 0; i < kRegisters; ++i) {
#pragma unroll 2
                for (int j = 0; j < min(kPassesPerRegister, kPasses); ++j) {
                    const int pass = i * kPassesPerRegister + j;
                    if (pass * kRowsPerPass >= num_rows) break;
                    const int found =
                        __shfl_sync(0xffffffffu, input_row[i], j * kRowsPerWarp + lane / 8);
                    const int row = first_row + pass * kRowsPerPass;
                    const bool is_zero = found < 0 || is_past_k;
                    const int64_t offset = is_zero ? 0 : int64_t{found} * stride_bytes + k_bytes;
                    if (row < num_rows)
                        ptx::copy_16(target + row * kRowBytes + ((chunk ^ row % 8) << 4),
                                     static_cast<const char*>(args.input) + offset, is_zero);
                }
            }
            ptx::barrier_arrive_after_copies(stage.full());
            stage.advance();
        }
    }
    stage.wait_empty();
    ptx::barrier_arrive(stage.full());
}

}  // namespace moecore::cuda::sm90
