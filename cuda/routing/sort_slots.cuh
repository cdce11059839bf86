#pragma once

// A stable counting sort of slots by expert in one cluster of blocks, without atomics.
//
// Block b of the cluster owns one contiguous range of the slots, each of its warps one contiguous
// segment of that, and a warp takes its segment 32 slots a step. A slot's row is then a sum of four
// counts: slots of lower experts; of its expert in lower blocks; in lower warps of its block; and
// its rank within the warp's segment. None of them depends on timing.

#include <cstdint>

#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/sort_by_expert.hpp"

namespace moecore::cuda {

/// Bytes of shared memory that sort_slots needs.
constexpr size_t sort_shared_bytes(int num_warps, int num_experts) {
    return static_cast<size_t>((num_warps + 3) * num_experts + kWarpSize + 1) * sizeof(int32_t);
}

/// Local id of an expert, `dropped` if it is none of this rank's.
__device__ inline int local_id(const SortByExpertArgs& args, int32_t expert, int dropped) {
    const int64_t local = int64_t{expert} - args.first_expert;
    return local >= 0 && local < args.num_local_experts ? static_cast<int>(local) : dropped;
}

/// That of a slot's expert, -1 if the slot is dropped.
__device__ inline int local_expert(const SortByExpertArgs& args, int64_t slot) {
    return local_id(args, args.topk_ids[slot], -1);
}

/// Leaves each slot's rank among its expert's in this warp's segment in slot_to_row, -1 for a
/// dropped one, and the number of expert e's in counters[e * stride], which are zero before.
__device__ inline void rank_segment(const SortByExpertArgs& args, int64_t begin, int64_t end,
                                    int lane, int32_t* counters, int stride) {
    const int num_bits = 32 - __clz(args.num_local_experts);  // of E_local, which means dropped
    constexpr int kSteps = 4;                                 // whose loads are in flight at a time
    for (int64_t first = begin; first < end; first += kSteps * kWarpSize) {
        int expert[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int64_t slot = first + i * kWarpSize + lane;
            expert[i] = slot < end ? local_expert(args, slot) : -1;
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            if (first + i * kWarpSize >= end) break;  // the whole warp
            const int64_t slot = first + i * kWarpSize + lane;
            const bool is_kept = expert[i] >= 0;
            const unsigned peers =
                equal_lanes(is_kept ? expert[i] : args.num_local_experts, num_bits);
            const int lower = __popc(peers & ((1u << lane) - 1));
            const int before = is_kept ? counters[expert[i] * stride] : 0;
            const int rank = is_kept ? before + lower : -1;
            __syncwarp();  // every peer has read the counter
            if (is_kept && lower == 0) counters[expert[i] * stride] = before + __popc(peers);
            __syncwarp();  // the next step sees the new counters
            if (slot < end) args.slot_to_row[slot] = rank;
        }
    }
}

/// Exclusive sum of `x` over the block's threads; `total` becomes the sum of all. `sums` holds 33.
__device__ inline int block_exclusive_sum(int x, int32_t* sums, int& total) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int num_warps = blockDim.x / kWarpSize;
    const int inclusive = inclusive_sum(x, lane);
    __syncthreads();  // nobody reads the sums of an earlier call any more
    if (lane == kWarpSize - 1) sums[warp] = inclusive;
    __syncthreads();  // every warp's sum is there
    if (warp == 0) {
        const int sum = lane < num_warps ? sums[lane] : 0;
        const int up_to_here = inclusive_sum(sum, lane);
        sums[lane] = up_to_here - sum;
        if (lane == kWarpSize - 1) sums[kWarpSize] = up_to_here;
    }
    __syncthreads();  // sums are those of lower warps
    total = sums[kWarpSize];
    return sums[warp] + inclusive - x;
}

inline constexpr int kFewSlots = 128;

/// What sort_slots does, for at most kFewSlots slots and by one block: every place is a count over
/// all slots. `local_experts` [kFewSlots] holds each slot's local expert, num_local_experts if the
/// slot is dropped and past the last one. Every thread of the block calls it.
__device__ inline void sort_few_slots(const SortByExpertArgs& args,
                                      const int4 (&local_experts)[kFewSlots / 4]) {
    const int num_slots = static_cast<int>(args.num_slots);
    const auto* experts = reinterpret_cast<const int*>(local_experts);
    // Slots whose expert is below `expert`, and those before `slot` that share it.
    const auto num_before = [&](int expert, int slot) {
        int count = 0;
#pragma unroll 4
        for (int i = 0; i < ceil_div(num_slots, 4); ++i) {
            const int4 four = local_experts[i];
            const int left = slot - 4 * i;
            count += four.x < expert + (0 < left);
            count += four.y < expert + (1 < left);
            count += four.z < expert + (2 < left);
            count += four.w < expert + (3 < left);
        }
        return count;
    };
    const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
    for (int slot = thread; slot < num_slots; slot += num_threads) {
        const int expert = experts[slot];
        const bool is_kept = expert < args.num_local_experts;
        const int row = num_before(expert, slot);  // dropped slots come last
        args.slot_to_row[slot] = is_kept ? row : -1;
        args.sorted_slots[row] = is_kept ? slot : -1;
    }
    for (int expert = thread; expert <= args.num_local_experts; expert += num_threads)
        args.expert_offsets[expert] = num_before(expert, 0);
}

/// Sorts args' slots; this block's are begin .. end - 1. `shared` has sort_shared_bytes(). Every
/// thread of the cluster calls it.
__device__ inline void sort_slots(const SortByExpertArgs& args, int64_t begin, int64_t end,
                                  int32_t* shared) {
    const int num_experts = args.num_local_experts;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int num_warps = blockDim.x / kWarpSize;
    const unsigned num_blocks = cluster_size(), block = cluster_rank();
    // [E_local, num_warps], with a column to spare: a warp's experts are then in different banks,
    // and so are an expert's warps.
    const int stride = num_warps + 1;
    int32_t* counters = shared;
    int32_t* block_count = counters + stride * num_experts;  // [E_local], read by other blocks
    int32_t* first_row = block_count + num_experts;          // [E_local]
    int32_t* sums = first_row + num_experts;                 // [33]

    // 1. Rank every slot within its warp's segment.
    for (int i = threadIdx.x; i < stride * num_experts; i += blockDim.x) counters[i] = 0;
    __syncthreads();  // counters are zero
    const int64_t steps = ceil_div(ceil_div(end - begin, kWarpSize), num_warps);
    const int64_t segment = min(begin + warp * steps * kWarpSize, end);
    const int64_t segment_end = min(segment + steps * kWarpSize, end);
    rank_segment(args, segment, segment_end, lane, counters + warp, stride);
    __syncthreads();  // counts are complete

    // 2. Turn the warps' counts into those of lower warps, and tell the cluster the block's: a few
    //    counts by one thread, many by one warp.
    if (num_warps <= kWarpSize / 4) {
        for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x) {
            int count = 0;
            for (int w = 0; w < num_warps; ++w) {
                const int in_segment = counters[expert * stride + w];
                counters[expert * stride + w] = count;
                count += in_segment;
            }
            block_count[expert] = count;
        }
    } else {
        for (int expert = warp; expert < num_experts; expert += num_warps) {
            const int count = lane < num_warps ? counters[expert * stride + lane] : 0;
            const int up_to_here = inclusive_sum(count, lane);
            if (lane < num_warps) counters[expert * stride + lane] = up_to_here - count;
            if (lane == kWarpSize - 1) block_count[expert] = up_to_here;
        }
    }
    cluster_sync();  // every block's counts are there

    // 3. Where this block's first row of each expert is. Every block adds up all of them.
    int num_rows = 0;
    for (int base = 0; base < num_experts; base += blockDim.x) {
        const int expert = base + static_cast<int>(threadIdx.x);
        int lower = 0, all = 0;
        for (unsigned b = 0; expert < num_experts && b < num_blocks; ++b) {
            const int count = load_from_cluster(block_count + expert, b);
            lower += b < block ? count : 0;
            all += count;
        }
        int total = 0;
        const int offset = num_rows + block_exclusive_sum(all, sums, total);
        if (expert < num_experts) {
            first_row[expert] = offset + lower;
            if (block == 0) args.expert_offsets[expert] = offset;
        }
        num_rows += total;
    }
    if (block == 0 && threadIdx.x == 0) args.expert_offsets[num_experts] = num_rows;
    cluster_sync();  // no block reads another's counts any more; this block's first rows are there

    // 4. Place the slots, and mark the rows past R.
    const int32_t* lower_warps = counters + warp;
#pragma unroll 4
    for (int64_t slot = segment + lane; slot < segment_end; slot += kWarpSize) {
        const int expert = local_expert(args, slot);
        if (expert < 0) continue;
        const int row = first_row[expert] + lower_warps[expert * stride] + args.slot_to_row[slot];
        args.slot_to_row[slot] = row;
        args.sorted_slots[row] = static_cast<int32_t>(slot);
    }
    const int64_t num_threads = int64_t{num_blocks} * blockDim.x;
    for (int64_t row = num_rows + int64_t{block} * blockDim.x + threadIdx.x; row < args.num_slots;
         row += num_threads)
        args.sorted_slots[row] = -1;
}

}  // namespace moecore::cuda
