#pragma once

// Which tile is the n-th: found on the device from expert_offsets, whose values no host has seen.

#include <cstdint>

#include "common/cluster.cuh"
#include "common/launch.cuh"

namespace moecore::cuda {

/// What a block computes at a time: `num_rows` rows of one group from `first_row` on, times one
/// tile of weight rows.
struct Tile {
    int group;  ///< -1: there are no more tiles
    int first_row;
    int num_rows;
    int weight_tile;
};

/// What every tile of a launch has in common.
struct TileGrid {
    const int64_t* expert_offsets;  ///< [G + 1], or nullptr with G = 1: rows 0 .. num_rows - 1
    int num_groups;
    int num_rows;    ///< offsets are kept within it
    int max_tokens;  ///< rows of the largest tile
    int num_weight_tiles;
    int sharing;  ///< sets of row tiles that take a weight tile in turn before the next one
};

/// Tiles are counted group by group. Within a group `sharing` row tiles take each weight tile
/// before the next one's turn, so that blocks which run at the same time read the same memory. A
/// group's rows are split evenly among its tiles, in multiples of kRowStep. The kCluster blocks of
/// a cluster take as many neighbouring row tiles at a time: their number is a multiple of it, and
/// the last may be empty. What is counted are such sets.
///
/// Held by a warp, which names the same grid in every call: lane l knows kGroupsPerLane
/// neighbouring groups of the current batch of 32 * kGroupsPerLane groups.
template <int kGroupsPerLane, int kRowStep, int kCluster>
class TileWalker {
public:
    TileWalker() = default;  // trivial: it may lie in shared memory
    __device__ explicit TileWalker(const TileGrid& grid) : batch_group_(0), batch_first_(0) {
        load_batch(grid);
    }

    /// Finds this block's tile of set `index`. All lanes call with the same index, not below that
    /// of the call before. Returns false, and a tile whose group is -1, if there are fewer tiles.
    __device__ bool find(const TileGrid& grid, int index, Tile& tile) {
        while (index >= batch_first_ + batch_tiles_) {
            batch_first_ += batch_tiles_;
            batch_group_ += kLanes * kGroupsPerLane;
            if (batch_group_ >= grid.num_groups) {
                tile.group = -1;
                batch_tiles_ = 0;
                return false;
            }
            load_batch(grid);
        }
        // 1. The lane that knows the tile's group looks it up.
        int within = index - batch_first_ - lane_first_;
        const unsigned owners = __ballot_sync(kAllLanes, within >= 0 && within < lane_tiles_);
        const int owner = __ffs(owners) - 1;
        int group = batch_group_ + lane() * kGroupsPerLane;
        int first = boundary_[0], rows = boundary_[1] - boundary_[0];
#pragma unroll
        for (int i = 1; i < kGroupsPerLane; ++i) {
            const int skipped = num_tiles(grid, rows);
            if (within >= skipped && group + 1 == batch_group_ + lane() * kGroupsPerLane + i) {
                within -= skipped;
                ++group;
                first = boundary_[i];
                rows = boundary_[i + 1] - boundary_[i];
            }
        }
        group = __shfl_sync(kAllLanes, group, owner);
        first = __shfl_sync(kAllLanes, first, owner);
        rows = __shfl_sync(kAllLanes, rows, owner);
        within = __shfl_sync(kAllLanes, within, owner);

        // 2. Its place within the group.
        const int row_sets = num_row_sets(grid, rows);
        const int sharing = grid.sharing * grid.num_weight_tiles;
        const int first_row_set = within / sharing * grid.sharing;
        const int width = min(grid.sharing, row_sets - first_row_set);
        const int rest = within % sharing;
        const int step = ceil_div(ceil_div(rows, row_sets * kCluster), kRowStep) * kRowStep;
        const int row_tile = (first_row_set + rest % width) * kCluster +
                             (kCluster > 1 ? static_cast<int>(cluster_rank()) : 0);
        const int skipped_rows = row_tile * step;
        tile.group = group;
        tile.first_row = first + skipped_rows;
        tile.num_rows = max(min(step, rows - skipped_rows), 0);
        tile.weight_tile = rest / width;
        return true;
    }

private:
    static constexpr int kLanes = 32;
    static constexpr unsigned kAllLanes = 0xffffffffu;

    __device__ static int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

    __device__ static int num_row_sets(const TileGrid& grid, int rows) {
        return ceil_div(rows, grid.max_tokens * kCluster);
    }
    /// Of a group with that many rows. A decreasing offset makes an empty group.
    __device__ static int num_tiles(const TileGrid& grid, int rows) {
        return num_row_sets(grid, max(rows, 0)) * grid.num_weight_tiles;
    }

    __device__ static int boundary(const TileGrid& grid, int group) {
        if (grid.expert_offsets == nullptr) return group == 0 ? 0 : grid.num_rows;
        const int64_t offset = grid.expert_offsets[min(group, grid.num_groups)];
        return static_cast<int>(min(max(offset, int64_t{0}), int64_t{grid.num_rows}));
    }

    __device__ void load_batch(const TileGrid& grid) {
        const int first = batch_group_ + lane() * kGroupsPerLane;
        lane_tiles_ = 0;
#pragma unroll
        for (int i = 0; i <= kGroupsPerLane; ++i) boundary_[i] = boundary(grid, first + i);
#pragma unroll
        for (int i = 0; i < kGroupsPerLane; ++i)
            lane_tiles_ += num_tiles(grid, boundary_[i + 1] - boundary_[i]);
        int sum = lane_tiles_;
        for (int distance = 1; distance < kLanes; distance *= 2) {
            const int other = __shfl_up_sync(kAllLanes, sum, distance);
            if (lane() >= distance) sum += other;
        }
        lane_first_ = sum - lane_tiles_;
        batch_tiles_ = __shfl_sync(kAllLanes, sum, kLanes - 1);
    }

    int batch_group_;  ///< first group of the batch
    int batch_first_;  ///< its first tile
    int batch_tiles_;
    int lane_first_, lane_tiles_;  ///< this lane's share of the batch's tiles
    int boundary_[kGroupsPerLane + 1];
};

}  // namespace moecore::cuda
