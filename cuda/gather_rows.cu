// Rows of a matrix by their index: what is sent to another rank, side by side or to where that rank
// wants it.
//
//   reads   M * K * sizeof(element) bytes of input, M indices, M addresses if there are any
//   writes  M * K * sizeof(element) bytes of output
//
// One block copies 4 KiB of one row, a thread 16 bytes at a time (one element where alignment
// forbids). Needs sm_80.

#include <cstdint>

#include "common/launch.cuh"
#include "moecore/kernels/gather_rows.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kBytesPerBlock = 4096;

/// The rows for one rank lie side by side: blocks that run together take some for each.
__device__ int64_t spread(unsigned block, unsigned num_blocks) {
    constexpr unsigned kWays = 16;
    const unsigned step = num_blocks / kWays;  // what is left over stays where it is
    return block < step * kWays ? int64_t{block % kWays} * step + block / kWays : block;
}

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const __grid_constant__ GatherRowsArgs args) {
    wait_for_predecessors();
    allow_dependents();
    const int64_t i = args.addresses != nullptr ? spread(blockIdx.x, gridDim.x) : blockIdx.x;
    const int64_t index = args.index != nullptr ? args.index[i] : i;
    const int64_t row = index / args.slots_per_row;
    if (index < 0 || row >= args.num_inputs) return;
    const char* source = static_cast<const char*>(args.input) + row * args.input_stride;
    char* target = args.addresses != nullptr
                       ? reinterpret_cast<char*>(args.addresses[i])
                       : static_cast<char*>(args.output) + i * args.output_stride;
    const int64_t begin = int64_t{blockIdx.y} * kBytesPerBlock;
    const int64_t end = min(begin + kBytesPerBlock, args.row_bytes);
#pragma unroll 2
    for (int64_t at = begin + threadIdx.x * int64_t{sizeof(Word)}; at < end;
         at += kThreads * int64_t{sizeof(Word)})
        *reinterpret_cast<Word*>(target + at) = *reinterpret_cast<const Word*>(source + at);
}

}  // namespace

void gather_rows(const GatherRowsArgs& args, Stream stream) {
    if (args.num_outputs == 0) return;  // a grid of 0 blocks is a launch error
    const auto alignment =
        reinterpret_cast<uintptr_t>(args.input) | reinterpret_cast<uintptr_t>(args.output) |
        static_cast<uintptr_t>(args.row_bytes) | static_cast<uintptr_t>(args.input_stride) |
        static_cast<uintptr_t>(args.output_stride);
    const auto kernel =
        alignment % sizeof(uint4) == 0 ? gather_rows_kernel<uint4> : gather_rows_kernel<uint16_t>;
    const dim3 grid(static_cast<unsigned>(args.num_outputs),
                    static_cast<unsigned>(ceil_div(args.row_bytes, kBytesPerBlock)));
    launch_dependent("gather_rows", kernel, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace moecore::cuda
