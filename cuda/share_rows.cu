// Rows that go to every rank: read once, written as often as there are ranks.
//
//   reads   T * K * sizeof(element) bytes
//   writes  P times as many, and padding
//
// A thread copies 16 bytes of a row to all (two where alignment forbids). Needs sm_80.

#include <algorithm>
#include <cstdint>

#include "common/launch.cuh"
#include "moecore/kernels/share_rows.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 256;

struct Problems {
    ShareRowsArgs of[2];
    bool are_aligned[2];  ///< rows are whole pieces of 16 bytes
};

int64_t num_pieces(const ShareRowsArgs& args, bool is_aligned) {
    const int64_t word = is_aligned ? sizeof(uint4) : sizeof(uint16_t);
    return args.num_targets > 0 ? args.padded_rows * (args.row_bytes / word) : 0;
}

template <typename Word>
__device__ void share_piece(const ShareRowsArgs& args, int64_t piece, Word padding) {
    const int64_t pieces = args.row_bytes / int64_t{sizeof(Word)};
    const int64_t row = piece / pieces;
    if (row >= args.padded_rows) return;
    const int64_t at = piece % pieces * int64_t{sizeof(Word)};
    const char* source = static_cast<const char*>(args.source) + row * args.source_stride + at;
    const Word word = row < args.num_rows ? *reinterpret_cast<const Word*>(source) : padding;
    for (int i = 0; i < args.num_targets; ++i)
        *reinterpret_cast<Word*>(args.targets[i] + row * args.row_bytes + at) = word;
}

__global__ void __launch_bounds__(kThreads)
    share_rows_kernel(const __grid_constant__ Problems problems) {
    wait_for_predecessors();
    allow_dependents();
    const ShareRowsArgs& args = problems.of[blockIdx.y];
    const int64_t piece = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    constexpr unsigned kOnes = 0xffffffffu;
    if (problems.are_aligned[blockIdx.y])
        share_piece(args, piece, uint4{kOnes, kOnes, kOnes, kOnes});
    else
        share_piece(args, piece, uint16_t{0xffff});
}

}  // namespace

void share_rows(const std::array<ShareRowsArgs, 2>& args, Stream stream) {
    Problems problems{{args[0], args[1]}, {}};
    int64_t most = 0;
    for (size_t i = 0; i < 2; ++i) {
        int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(args[i].source)) |
                       args[i].source_stride | args[i].row_bytes;
        for (int t = 0; t < args[i].num_targets; ++t) bits |= args[i].targets[t];
        problems.are_aligned[i] = bits % int64_t{sizeof(uint4)} == 0;
        most = std::max(most, num_pieces(args[i], problems.are_aligned[i]));
    }
    if (most == 0) return;  // a grid of 0 blocks is a launch error
    const dim3 grid(static_cast<unsigned>(ceil_div(most, int64_t{kThreads})), 2);
    launch_dependent("share_rows", share_rows_kernel, grid, dim3(kThreads), 0, stream, problems);
}

}  // namespace moecore::cuda
