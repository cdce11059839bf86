#pragma once

// How K blocks get into shared memory on sm_80: all threads copy 16 bytes at a time, a few blocks
// ahead of the products, and from one tile to the next without a pause.

#include <cstdint>

#include "common/mma_sm80.cuh"
#include "common/warp.cuh"
#include "grouped_gemm/sm80_config.hpp"
#include "grouped_gemm/tile_walker.cuh"
#include "grouped_gemm/work_counters.cuh"
#include "moecore/kernels/grouped_gemm.hpp"

namespace moecore::cuda::sm80 {

struct Params {
    GroupedGemmArgs args;
    TileGrid grid;
    int stage_bytes;         ///< weights, then max_tokens rows of input
    int num_k_blocks;        ///< of the shape's BLOCK_K
    int64_t weight_step;     ///< bytes of weights from one pass of all threads to the next
    bool is_output_aligned;  ///< rows of output take 16-byte stores
    bool claims_tiles;       ///< through args.work_counters
};

using Walker = TileWalker<4, 16, 1>;

/// What threads tell each other, beside the ring.
template <typename Shape>
struct Shared {
    Tile upcoming;              ///< what the loader turns to next
    Tile tile[Shape::kStages];  ///< of a stage that begins a tile
    /// Where rows of a tile begin, in 16 bytes from the start of input. Tiles use both in turn.
    uint32_t source[2][Shape::kMaxTokens];
    Walker walker[kWarpSize];  ///< of the first warp's lanes; in registers all threads would pay
};

/// A row of a stage is one K block. Its pieces of 16 bytes are permuted so that equal pieces of
/// eight neighbouring rows, and the pieces of one, lie in different banks.
template <typename Shape>
__device__ uint32_t piece_offset(int row, int piece) {
    constexpr int kPieces = Shape::BLOCK_K / 8;
    static_assert(kPieces == 4 || kPieces == 8);
    const int swizzled = piece ^ (kPieces == 8 ? row % 8 : row / 2 % 4);
    return static_cast<uint32_t>((row * kPieces + swizzled) * 16);
}

/// Fills stages, one K block after the other, and knows the tile that each belongs to. The next
/// tile is looked up while a tile's blocks are copied: first the tile, by one warp, then its rows.
template <bool kIsGated, typename Shape>
class Loader {
public:
    __device__ Loader(const Params& params, Shared<Shape>& shared, uint32_t ring)
        : params_(params), shared_(shared), ring_(ring), index_(static_cast<int>(blockIdx.x)) {
        if (threadIdx.x < kWarpSize) shared_.walker[threadIdx.x] = Walker(params.grid);
        find();
        __syncthreads();  // the first tile is known
        fetch_slot();
        place_source();
        __syncthreads();  // its rows are, too
        enter_tile();
    }

    /// Starts the copies of a K block into `stage`; after the last tile there are none. No
    /// branches: products may be issued among the copies. Missing rows are left as they are,
    /// because no row of output depends on another's input. Pieces past K become zeros.
    __device__ __forceinline__ void copy(int stage) {
        const bool exists = k_ * Shape::BLOCK_K + piece() * 8 < params_.args.k_dim;
        const int ahead = exists ? k_ : 0;
        const uint32_t target =
            ring_ + stage * params_.stage_bytes + piece_offset<Shape>(first_row(), piece());
        const uint8_t* weights = weights_ + ahead * kRowBytes;
#pragma unroll
        for (int pass = 0; pass < kWeightPasses; ++pass) {
            copy_async_if(pass < weight_passes_, target + pass * kRowsPerPass * kRowBytes, weights,
                          exists);
            weights += params_.weight_step;
        }
        const auto* input = static_cast<const uint4*>(params_.args.input);
        const uint32_t* source = shared_.source[parity_];
        const uint32_t within = exists ? ahead * kPieces + piece() : 0;
#pragma unroll
        for (int pass = 0; pass < kTokenPasses; ++pass) {
            const int row = first_row() + pass * kRowsPerPass;
            copy_async_if(row < num_rows_,
                          target + (Shape::kWeightRows + pass * kRowsPerPass) * kRowBytes,
                          input + (source[row] + within), exists);
        }
    }

    /// To the next block, after one that went to `stage`. A barrier of the thread block lies
    /// between two calls.
    __device__ __forceinline__ void advance(int stage) {
        ++k_;
        if (k_ == 1 || params_.num_k_blocks - k_ <= 3) look_ahead(stage);
    }

private:
    static constexpr int kPieces = Shape::BLOCK_K / 8;  ///< of 16 bytes, in a row
    static constexpr int kRowBytes = 2 * Shape::BLOCK_K;
    static constexpr int kRowsPerPass = Shape::kThreads / kPieces;
    static constexpr int kWeightPasses = Shape::kWeightRows / kRowsPerPass;
    static constexpr int kTokenPasses = ceil_div(Shape::kMaxTokens, kRowsPerPass);
    static_assert(kRowsPerPass % 16 == 0 && Shape::kWeightRows % kRowsPerPass == 0);
    static_assert(Shape::kMaxTokens <= Shape::kThreads);

    __device__ int piece() const { return static_cast<int>(threadIdx.x) % kPieces; }
    __device__ int first_row() const { return static_cast<int>(threadIdx.x) / kPieces; }

    __device__ void enter_tile() {
        const Tile tile = shared_.upcoming;
        k_ = 0;
        parity_ ^= 1;
        is_past_end_ = tile.group < 0;
        num_rows_ = is_past_end_ ? 0 : tile.num_rows;
        weight_passes_ = 0;
        if (is_past_end_) return;

        // Rows of a gated tile: eight of gate and the same eight of up take turns, whatever their
        // order in memory, so that both sums of a feature reach one thread.
        const GroupedGemmArgs& args = params_.args;
        const int features = static_cast<int>(kIsGated ? args.n / 2 : args.n);
        constexpr int kStep = kIsGated ? kRowsPerPass / 2 : kRowsPerPass;
        const int row = first_row();
        int feature = tile.weight_tile * Shape::kWeightRows + row;
        int64_t weight_row = feature;
        if (kIsGated) {
            feature = tile.weight_tile * (Shape::kWeightRows / 2) + row / 16 * 8 + row % 8;
            const int half = row / 8 % 2;
            weight_row = args.config.gate_order == GateOrder::kInterleaved
                             ? 2 * int64_t{feature} + half
                             : feature + int64_t{half} * features;
        }
        weight_passes_ = ceil_div(max(features - feature, 0), kStep);
        const int64_t offset = tile.group * args.group_stride + weight_row * args.n_stride;
        weights_ = static_cast<const uint8_t*>(args.weights) + 2 * offset + 16 * piece();
    }

    /// One step in each call, so that nobody waits for memory; of a short tile, all in the last.
    __device__ void look_ahead(int stage) {
        // Not before: until this block was copied, products might not have read the stage's last.
        if (k_ == 1 && threadIdx.x == 0) shared_.tile[stage] = shared_.upcoming;
        if (is_past_end_) return;
        const int left = params_.num_k_blocks - k_;
        const bool is_short = params_.num_k_blocks < 5;
        const bool is_last = left == 0;
        if (is_short ? is_last : k_ == 1) claim();
        if (is_short && is_last) __syncthreads();  // everybody has entered this tile
        if (is_short ? is_last : left == 3) find();
        if (is_short && is_last) __syncthreads();  // the next tile is known
        if (is_short ? is_last : left == 2) fetch_slot();
        if (is_short ? is_last : left == 1) place_source();
        if (is_short && is_last) __syncthreads();  // its rows are, too
        if (is_last) enter_tile();
    }
    __device__ void claim() {
        if (!params_.claims_tiles)
            index_ += static_cast<int>(gridDim.x);
        else if (threadIdx.x == 0)
            index_ = claim_tile(params_.args.work_counters, static_cast<int>(gridDim.x));
    }
    __device__ void find() {
        if (threadIdx.x >= kWarpSize) return;
        if (params_.claims_tiles) index_ = __shfl_sync(kFullMask, index_, 0);
        Tile tile{};
        Walker walker = shared_.walker[threadIdx.x];
        const bool is_found = walker.find(params_.grid, index_, tile);
        shared_.walker[threadIdx.x] = walker;
        if (threadIdx.x > 0) return;
        shared_.upcoming = tile;
        if (!is_found && params_.claims_tiles) end_claims(params_.args.work_counters);
    }
    __device__ void fetch_slot() {
        const Tile tile = shared_.upcoming;
        const int row = static_cast<int>(threadIdx.x);
        slot_ = -1;
        if (tile.group < 0 || row >= tile.num_rows) return;
        slot_ = tile.first_row + row;
        if (params_.args.sorted_slots != nullptr) slot_ = params_.args.sorted_slots[slot_];
    }
    /// For a slot outside input, its first row.
    __device__ void place_source() const {
        const GroupedGemmArgs& args = params_.args;
        const int row =
            args.sorted_slots == nullptr || slot_ < 0 ? slot_ : slot_ / args.slots_per_token;
        const bool exists = row >= 0 && row < args.num_input_rows;
        const auto stride = static_cast<uint32_t>(args.input_stride / 8);
        if (static_cast<int>(threadIdx.x) < Shape::kMaxTokens)
            shared_.source[parity_ ^ 1][threadIdx.x] = exists ? row * stride : 0;
    }

    const Params& params_;
    Shared<Shape>& shared_;
    uint32_t ring_;
    int index_;      ///< of the tile that is looked up, in the first warp
    int slot_ = -1;  ///< of this thread's row of that tile
    int k_ = 0;      ///< the next K block
    int parity_ = 0;
    int num_rows_ = 0;
    int weight_passes_ = 0;  ///< with weight rows that exist
    const uint8_t* weights_ = nullptr;
    bool is_past_end_ = false;
};

}  // namespace moecore::cuda::sm80
