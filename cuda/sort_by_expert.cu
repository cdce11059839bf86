// Stable counting sort of slots by expert, in one thread block.
//
//   reads   2 * S * 4 bytes                topk_ids [S], S = T * k, once a pass
//   writes  2 * S * 4 + E_local * 8 bytes  sorted_slots, slot_to_row [S], expert_offsets
//
// Each warp owns one contiguous segment of the slots and a row of counters in shared memory; its
// rows of an expert begin where the earlier segments' end, so no order depends on timing. Far from
// the memory roof: one SM works, and each pass waits for S / 1024 loads one after the other (with
// more than 384 experts fewer warps fit, and it waits for more). Needs sm_80.

#include <algorithm>
#include <cstdint>

#include "common/launch.cuh"
#include "moecore/kernels/sort_by_expert.hpp"

namespace moecore::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kCounters = 12288;  ///< 48 KiB, the shared memory every device grants unasked

/// Local id of a slot's expert, -1 if the slot is dropped.
__device__ int local_expert(const SortByExpertArgs& args, int64_t slot) {
    const int64_t local = args.topk_ids[slot] - args.first_expert;
    return local >= 0 && local < args.num_local_experts ? static_cast<int>(local) : -1;
}

/// Sum over the lanes up to and including this one.
__device__ int inclusive_sum(int x, int lane) {
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int below = __shfl_up_sync(kFullMask, x, distance);
        if (lane >= distance) x += below;
    }
    return x;
}

__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    sort_by_expert_kernel(const __grid_constant__ SortByExpertArgs args) {
    extern __shared__ int32_t counters[];  // [num_warps, E_local]
    const int num_warps = blockDim.x / kWarpSize;
    const int num_experts = args.num_local_experts;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t steps = ceil_div(ceil_div(args.num_slots, kWarpSize), num_warps);
    const int64_t begin = warp * steps * kWarpSize;
    const int64_t end = min(begin + steps * kWarpSize, args.num_slots);
    int32_t* my_counters = counters + warp * num_experts;

    // 1. Count each segment's slots by expert.
    for (int i = threadIdx.x; i < num_warps * num_experts; i += blockDim.x) counters[i] = 0;
    __syncthreads();  // counters are zero
    for (int64_t slot = begin + lane; slot < end; slot += kWarpSize) {
        const int expert = local_expert(args, slot);
        if (expert >= 0) atomicAdd(&my_counters[expert], 1);  // a count, whatever the order
    }
    __syncthreads();  // counts are complete

    // 2. Turn counts into first rows, over experts and, within an expert, over segments.
    if (warp == 0) {
        int total = 0;
        for (int first = 0; first < num_experts; first += kWarpSize) {
            const int expert = first + lane;
            int count = 0;
            if (expert < num_experts)
                for (int w = 0; w < num_warps; ++w) count += counters[w * num_experts + expert];
            const int up_to_here = total + inclusive_sum(count, lane);
            if (expert < num_experts) {
                int row = up_to_here - count;
                args.expert_offsets[expert] = row;
                for (int w = 0; w < num_warps; ++w) {
                    const int segment_count = counters[w * num_experts + expert];
                    counters[w * num_experts + expert] = row;
                    row += segment_count;
                }
            }
            total = __shfl_sync(kFullMask, up_to_here, kWarpSize - 1);
        }
        if (lane == 0) args.expert_offsets[num_experts] = total;
    }
    __syncthreads();  // counters are each warp's next row of each expert, expert_offsets is written

    // 3. Place each segment's slots, 32 a step. Lanes of one expert rank themselves by lane.
    const unsigned lanes_below = (1u << lane) - 1;
    for (int64_t first = begin; first < end; first += kWarpSize) {
        const int64_t slot = first + lane;
        const int expert = slot < end ? local_expert(args, slot) : -1;
        const unsigned peers = __match_any_sync(kFullMask, expert);
        const int rank = __popc(peers & lanes_below);
        const int row = expert >= 0 ? my_counters[expert] + rank : -1;
        __syncwarp();  // every peer has read the counter
        if (expert >= 0 && rank == 0) my_counters[expert] += __popc(peers);
        __syncwarp();  // the next step sees the new counters
        if (slot < end) args.slot_to_row[slot] = row;
        if (row >= 0) args.sorted_slots[row] = static_cast<int32_t>(slot);
    }

    // 4. Mark the rows past R.
    for (int64_t row = args.expert_offsets[num_experts] + threadIdx.x; row < args.num_slots;
         row += blockDim.x)
        args.sorted_slots[row] = -1;
}

}  // namespace

void sort_by_expert(const SortByExpertArgs& args, Stream stream) {
    if (args.num_local_experts > kCounters)
        throw UnsupportedError(concat("sort_by_expert: more than ", kCounters, " local experts"));
    // As many warps as have counters, but no more than one for every 32 slots.
    const int64_t num_warps =
        std::clamp<int64_t>(ceil_div(args.num_slots, kWarpSize), 1,
                            std::min(kMaxWarps, kCounters / args.num_local_experts));
    const size_t shared_bytes =
        static_cast<size_t>(num_warps) * args.num_local_experts * sizeof(int32_t);
    sort_by_expert_kernel<<<1, static_cast<unsigned>(num_warps * kWarpSize), shared_bytes,
                            native(stream)>>>(args);
    check(cudaPeekAtLastError(), "sort_by_expert launch");
}

}  // namespace moecore::cuda
