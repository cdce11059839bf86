// Stable counting sorts of slots by expert, each in one cluster of up to eight thread blocks.
//
//   reads   4 * S * 4 bytes                topk_ids, slot_to_row [S], S = T * k, twice each
//   writes  3 * S * 4 + E_local * 8 bytes  sorted_slots, slot_to_row [S], expert_offsets
//
// Latency, not memory: eight multiprocessors work on what stays in L2. Needs sm_80; before sm_90,
// which has no clusters, one block.

#include <algorithm>
#include <cstdint>

#include "common/launch.cuh"
#include "moecore/kernels/sort_by_expert.hpp"
#include "moecore/sort_by_expert.hpp"
#include "routing/sort_slots.cuh"

namespace moecore::cuda {
namespace {

constexpr int kMaxWarps = 32;
constexpr int kMaxBlocks = 8;                       ///< every device with clusters grants that many
constexpr int64_t kSlotsPerBlock = 512;             ///< before another block joins
constexpr size_t kGrantedBytes = size_t{48} << 10;  ///< of shared memory, unasked

struct Sorts {
    SortByExpertArgs args[kMaxSorts];
};

__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    sort_by_expert_kernel(const __grid_constant__ Sorts sorts) {
    extern __shared__ int32_t shared[];
    const SortByExpertArgs& args = sorts.args[blockIdx.y];
    wait_for_predecessors();
    allow_dependents();
    const int64_t slots_per_block = ceil_div(args.num_slots, int64_t{gridDim.x});
    const int64_t begin = min(blockIdx.x * slots_per_block, args.num_slots);
    sort_slots(args, begin, min(begin + slots_per_block, args.num_slots), shared);
}

}  // namespace

void sort_by_expert(std::span<const SortByExpertArgs> sorts, Stream stream) {
    Sorts all{};
    std::copy(sorts.begin(), sorts.end(), all.args);
    int64_t most_slots = 0;
    int most_experts = 1;
    for (const SortByExpertArgs& args : sorts) {
        most_slots = std::max(most_slots, args.num_slots);
        most_experts = std::max(most_experts, args.num_local_experts);
    }
    unsigned num_blocks = 1;
    if (is_sm90())
        while (num_blocks < kMaxBlocks && num_blocks * kSlotsPerBlock < most_slots) num_blocks *= 2;
    // A thread for every slot and for every expert, as far as threads and shared memory go.
    const int64_t slots_per_block = ceil_div(most_slots, int64_t{num_blocks});
    const int64_t threads = std::max<int64_t>(slots_per_block, most_experts);
    const int num_warps =
        static_cast<int>(std::clamp<int64_t>(ceil_div(threads, kWarpSize), 1, kMaxWarps));
    const size_t shared_bytes = sort_shared_bytes(num_warps, most_experts);
    if (shared_bytes > kGrantedBytes)  // at most 141 KiB: an sm_80 has 163
        check(
            cudaFuncSetAttribute(sort_by_expert_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            "cudaFuncSetAttribute");
    launch_dependent_clusters("sort_by_expert", sort_by_expert_kernel,
                              dim3(num_blocks, static_cast<unsigned>(sorts.size())),
                              dim3(static_cast<unsigned>(num_warps * kWarpSize)), num_blocks,
                              shared_bytes, stream, all);
}

}  // namespace moecore::cuda
