// Where each slot's result arrives, from its expert's owner.
//
//   reads   S * 4 bytes of topk_ids, P + 1 bounds for each slot, from cache
//   writes  S * 4 bytes
//
// One thread a slot. Needs sm_80.

#include <cstdint>

#include "common/launch.cuh"
#include "moecore/kernels/locate_results.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    locate_results_kernel(const __grid_constant__ LocateResultsArgs args) {
    const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (slot >= args.num_slots) return;
    const int32_t id = args.topk_ids[slot];
    int owner = -1;
    for (int rank = 0; rank <= args.num_ranks; ++rank) owner += id >= args.first_experts[rank];
    const bool has_owner = owner >= 0 && owner < args.num_ranks;
    args.output[slot] = has_owner ? static_cast<int32_t>(owner * args.num_slots + slot) : -1;
}

}  // namespace

void locate_results(const LocateResultsArgs& args, Stream stream) {
    if (args.num_slots == 0) return;  // a grid of 0 blocks is a launch error
    const auto blocks = ceil_div(args.num_slots, int64_t{kThreads});
    locate_results_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, native(stream)>>>(args);
    check(cudaPeekAtLastError(), "locate_results launch");
}

}  // namespace moecore::cuda
