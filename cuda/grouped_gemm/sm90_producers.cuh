#pragma once

// The warpgroup that fills the ring: one warp has the copy engine load weights, three gather input
// rows. Each warp walks the tiles by itself, so that weights never wait for the search of rows.
// Rows that lie side by side come by the copy engine too: it is faster, and the three warps are
// idle.

#include "grouped_gemm/sm90_stages.cuh"

namespace moecore::cuda::sm90 {

/// Where rows are gathered, a claim is made so many K blocks before a tile's last and handed on so
/// many later, when its answer has come: the gathering warps look up the next tile's rows in time.
/// Else it is made as late as the ring's work allows, when it says best who is free.
constexpr int kClaimAhead = 8;
constexpr int kClaimLatency = 2;

/// Loads boxes of weights, and of rows with copies_rows, and tells consumers which tile a stage
/// begins. The last box of rows may reach past the tile; what it brings is multiplied, not stored.
/// With begins_early the ring fills with the first tile's weights before the kernel ahead has
/// ended.
template <bool kIsGated, typename Shape>
__device__ void produce_boxes(const Params& params, const CUtensorMap& map,
                              const CUtensorMap& rows_map, Stage stage, ClaimQueue& claims) {
    constexpr int kBoxBytes = kBoxRows * kRowBytes;
    const bool is_leader = threadIdx.x % kWarpSize == 0;
    const ptx::Keep keep = params.keeps_weights ? ptx::Keep::kNormal : ptx::Keep::kBriefly;
    typename Shape::Walker walker(params.grid);
    ClaimPlace<Shape::kCluster> claim(claims);
    const int num_clusters = static_cast<int>(gridDim.x) / Shape::kCluster;
    const int rank = Shape::kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    constexpr int kPartBytes = Shape::kWeightBytes / Shape::kCluster;
    Tile tile{};
    const auto copy_weights = [&](const Stage& to, int k, int row_boxes) {
        // Rows of a box come in eights; gated: eight of gate, the same eight of up.
        constexpr int kEights = Shape::kWeightRows / (kIsGated ? 16 : 8);
        const int eights = tile.weight_tile * kEights + rank * (kEights / Shape::kCluster);
        if (k == 0) to.tile() = tile;
        ptx::barrier_arrive_expect(to.full(), Shape::kWeightBytes + row_boxes * kBoxBytes);
        const int box[5] = {k * BLOCK_K, 0, kIsGated ? 0 : eights, kIsGated ? eights : 0,
                            tile.group};
        if constexpr (Shape::kCluster > 1)
            ptx::copy_box_to((1u << Shape::kCluster) - 1, to.weights() + rank * kPartBytes, map,
                             box, to.full(), keep);
        else
            ptx::copy_box(to.weights(), map, box, to.full(), keep);
    };
    // Pairs have long to run, and no registers for this.
    bool must_wait = Shape::kCluster == 1 && params.begins_early;
    const bool has_takers = Shape::kCluster > 1 || !params.copies_rows;
    const int last = params.num_k_blocks - 1;
    const int claim_at = params.copies_rows ? last : max(last - kClaimAhead, 0);
    const int put_at = min(claim_at + kClaimLatency, last);
    int index = static_cast<int>(blockIdx.x) / Shape::kCluster;
    while (walker.find(params.grid, index, tile)) {
        index += num_clusters;
        if (is_leader) {
            const int row_boxes = params.copies_rows ? ceil_div(tile.num_rows, kBoxRows) : 0;
            int num_ahead = 0;  // K blocks whose weights are on their way
            if (must_wait) {
                Stage ahead = stage;
                for (; num_ahead < min(params.num_stages, params.num_k_blocks); ++num_ahead) {
                    copy_weights(ahead, num_ahead, row_boxes);
                    ahead.advance();
                }
                wait_for_predecessors();
                must_wait = false;
            }
            for (int k = 0; k < params.num_k_blocks; ++k) {
                // The answer to a claim comes while the ring still has work.
                const bool claims = params.claims_tiles && rank == 0;
                if (claims && k == claim_at)
                    index = claim_tile(params.args.work_counters, num_clusters);
                if (k >= num_ahead) {
                    stage.template wait_all_empty<Shape::kCluster>();
                    if (params.asks_for_two && k % 2 == 0 && k < last) {
                        Stage next = stage;
                        next.advance();
                        next.wait_empty();
                    }
                    copy_weights(stage, k, row_boxes);
                }
                for (int i = 0; i < row_boxes; ++i) {
                    const int rows[2] = {k * BLOCK_K, tile.first_row + i * kBoxRows};
                    ptx::copy_box(stage.weights() + Shape::kWeightBytes + i * kBoxBytes, rows_map,
                                  rows, stage.full(), ptx::Keep::kNormal);
                }
                stage.advance();
                if (claims && has_takers && k == put_at) claim.put(index);
            }
        }
        if (params.claims_tiles)
            index = rank == 0 ? __shfl_sync(0xffffffffu, index, 0) : claim.take();
    }
    if (is_leader) {
        if (must_wait) wait_for_predecessors();
        if (params.claims_tiles) end_claims(params.args.work_counters);
        stage.template wait_all_empty<Shape::kCluster>();
        stage.tile() = tile;  // there are no more
        ptx::barrier_arrive(stage.full());
    }
    __syncwarp();
}

/// Gathers input rows (for a slot outside input, its first row) in the layout of swizzled_tile;
/// what follows a tile's last row is left as it is, because no row of output depends on another's
/// input. Eight threads copy a row's 128 bytes.
template <typename Shape>
__device__ void produce_rows(const Params& params, Stage stage, ClaimQueue& claims) {
    constexpr int kRowsPerPass = kGatherThreads / 8;
    constexpr int kPasses = ceil_div(Shape::kMaxTokens, kRowsPerPass);
    static_assert(kRowsPerPass % 4 == 0, "two passes are a multiple of 8 rows");
    const GroupedGemmArgs& args = params.args;
    const int thread = static_cast<int>(threadIdx.x) - kWarpSize;
    const int chunk = thread % 8;
    const int first_row = thread / 8;
    const auto stride = static_cast<uint32_t>(args.input_stride / 8);  // in 16 bytes
    const int row_bytes = static_cast<int>(args.k_dim * 2);
    // Where this thread's 16 bytes go in even and in odd passes.
    const uint32_t even = first_row * kRowBytes + ((chunk ^ first_row % 8) << 4);
    const uint32_t odd = first_row * kRowBytes + ((chunk ^ (first_row + kRowsPerPass) % 8) << 4);

    typename Shape::Walker walker(params.grid);
    ClaimPlace<Shape::kCluster> claim(claims);
    Tile tile;
    for (int index = static_cast<int>(blockIdx.x) / Shape::kCluster;
         walker.find(params.grid, index, tile);
         index = params.claims_tiles ? claim.take()
                                     : index + static_cast<int>(gridDim.x / Shape::kCluster)) {
        // 1. Look up this thread's rows, in 16 bytes from the start of input.
        uint32_t source[kPasses];
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = first_row + pass * kRowsPerPass;
            source[pass] = 0;
            if (row >= tile.num_rows) continue;
            int input_row = tile.first_row + row;
            if (args.sorted_slots != nullptr) {
                const int slot = args.sorted_slots[input_row];
                input_row = slot >= 0 ? slot / args.slots_per_token : -1;
            }
            if (input_row >= 0 && input_row < args.num_input_rows)
                source[pass] = static_cast<uint32_t>(input_row) * stride + chunk;
        }

        // 2. Copy, one K block after the other. Adding K to the 32-bit part keeps the compiler from
        //    holding a 64-bit address for each row.
        const int rows_below = tile.num_rows - first_row;
        for (int k = 0; k < params.num_k_blocks; ++k) {
            stage.wait_empty();
            const bool is_past_k = k * kRowBytes + chunk * 16 >= row_bytes;
            const uint32_t ahead = is_past_k ? 0 : k * (kRowBytes / 16);
            const uint32_t target = stage.weights() + Shape::kWeightBytes;
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                if (pass * kRowsPerPass >= rows_below) break;
                ptx::copy_16(
                    target + (pass % 2 == 0 ? even : odd) + pass * kRowsPerPass * kRowBytes,
                    static_cast<const uint4*>(args.input) + (source[pass] + ahead), is_past_k);
            }
            ptx::barrier_arrive_after_copies(stage.full());
            stage.advance();
        }
    }
    stage.wait_empty();
    ptx::barrier_arrive(stage.full());
}

}  // namespace moecore::cuda::sm90
