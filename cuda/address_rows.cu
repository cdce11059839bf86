// Where rows go that cross to other ranks: the address of each, from those of the parts they make.
//
//   reads   N indices or slots, if there are any
//   writes  N addresses
//
// A thread a row, which looks for its part among at most 64; a slot tells its rank. Any
// architecture.

#include <algorithm>

#include "common/launch.cuh"
#include "moecore/kernels/address_rows.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;

struct Problems {
    AddressRowsArgs of[2];
};

__global__ void __launch_bounds__(kThreads)
    address_rows_kernel(const __grid_constant__ Problems problems) {
    wait_for_predecessors();
    allow_dependents();
    const AddressRowsArgs& args = problems.of[blockIdx.y];
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= args.num_rows) return;
    // The last part that begins at or before row i: empty ones begin where the next one does.
    int part = 0;
    for (int next = 1; next < args.num_parts; ++next)
        if (args.firsts[next] <= i) part = next;
    const int64_t row = args.index != nullptr ? args.index[i] : i;
    if (row < 0 || row >= args.num_rows) return;
    args.addresses[row] = args.targets[part] + (i - args.firsts[part]) * args.row_bytes;
}

__global__ void __launch_bounds__(kThreads)
    address_slots_kernel(const __grid_constant__ AddressSlotsArgs args) {
    wait_for_predecessors();
    allow_dependents();
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= args.num_slots) return;
    const int64_t slot = args.slots[row];
    if (slot < 0 || slot >= args.num_slots) return;
    args.addresses[row] =
        args.targets[slot / args.slots_per_rank] + slot % args.slots_per_rank * args.row_bytes;
}

}  // namespace

void address_rows(const std::array<AddressRowsArgs, 2>& args, Stream stream) {
    const int64_t most = std::max(args[0].num_rows, args[1].num_rows);
    if (most == 0) return;  // a grid of 0 blocks is a launch error
    const dim3 grid(static_cast<unsigned>(ceil_div(most, kThreads)), 2);
    launch_dependent("address_rows", address_rows_kernel, grid, dim3(kThreads), 0, stream,
                     Problems{{args[0], args[1]}});
}

void address_slots(const AddressSlotsArgs& args, Stream stream) {
    if (args.num_slots == 0) return;
    const dim3 grid(static_cast<unsigned>(ceil_div(args.num_slots, int64_t{kThreads})));
    launch_dependent("address_slots", address_slots_kernel, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace moecore::cuda
