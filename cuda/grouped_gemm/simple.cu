// Grouped GEMM, the readable reference: any size, stride and alignment, no tensor cores.
//
//   reads   R * K * ceil(N / 64) + N * K * (64-row tiles of all groups) elements   input, weights
//   writes  R * N (gated: R * N / 2) elements                                      output
//
// A block of 256 threads makes a tile of 64 rows x 64 weight rows, 4 x 4 a thread, from 32-deep
// slices in shared memory. Each output has one float32 accumulator, fed in order k = 0 .. K - 1:
// its bits depend on neither tile nor batch. The grid covers any split of num_rows into groups;
// each block finds its tile in expert_offsets, and surplus blocks leave. Wrong offsets and slots
// give wrong rows, but no access outside a tensor. Needs sm_80.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "grouped_gemm/epilogue.cuh"
#include "grouped_gemm/simple.hpp"

namespace moecore::cuda {
namespace {

constexpr int BLOCK_M = 64;
constexpr int BLOCK_N = 64;
constexpr int BLOCK_K = 32;
constexpr int kSide = 16;  ///< threads along each side of a tile
constexpr int kThreads = kSide * kSide;
constexpr int kBlocksPerMultiprocessor = 3;  ///< leaves 80 registers a thread
constexpr int kRowsPerThread = BLOCK_M / kSide;
constexpr int kColumnsPerThread = BLOCK_N / kSide;

/// The rows [begin, end) of one group that a block computes.
struct RowTile {
    int group;
    int64_t begin;
    int64_t end;
};

/// The index-th row tile, counted over all groups in order. False if there are fewer.
__device__ bool find_row_tile(const GroupedGemmArgs& args, int64_t index, RowTile& tile) {
    for (int group = 0; group < args.num_groups; ++group) {
        const bool is_split = args.expert_offsets != nullptr;
        const int64_t first = is_split ? max(args.expert_offsets[group], int64_t{0}) : 0;
        const int64_t end =
            is_split ? min(args.expert_offsets[group + 1], args.num_rows) : args.num_rows;
        const int64_t num_tiles = first < end ? ceil_div(end - first, BLOCK_M) : 0;
        if (index < num_tiles) {
            const int64_t begin = first + index * BLOCK_M;
            tile = {group, begin, min(begin + BLOCK_M, end)};
            return true;
        }
        index -= num_tiles;
    }
    return false;
}

/// Which of the N weight rows is column `column` of tile `column_tile`; N or more if none is. A
/// gated tile holds 32 gate columns and then the up columns of the same 32 features.
__device__ int64_t weight_row(const GroupedGemmArgs& args, int64_t column_tile, int column) {
    if (args.config.activation == Activation::kNone) return column_tile * BLOCK_N + column;
    const bool is_up = column >= BLOCK_N / 2;
    const int64_t num_features = args.n / 2;
    const int64_t feature = column_tile * (BLOCK_N / 2) + column % (BLOCK_N / 2);
    if (feature >= num_features) return args.n;
    return args.config.gate_order == GateOrder::kInterleaved ? 2 * feature + is_up
                                                             : feature + is_up * num_features;
}

__device__ float load_bias(const GroupedGemmArgs& args, int group, int64_t row) {
    const int64_t offset = group * args.bias_stride + row;
    return args.bias_dtype == DType::kBFloat16
               ? to_float(static_cast<const __nv_bfloat16*>(args.bias)[offset])
               : static_cast<const float*>(args.bias)[offset];
}

__device__ void store_output(const GroupedGemmArgs& args, int64_t row, int64_t column, float x) {
    if (args.output_dtype == DType::kBFloat16)
        output_row<false, __nv_bfloat16>(args, row)[column] = from_float<__nv_bfloat16>(x);
    else
        output_row<false, float>(args, row)[column] = x;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmArgs args) {
    // One column of padding keeps a warp's transposed stores in different banks.
    __shared__ float input_tile[BLOCK_K][BLOCK_M + 1];
    __shared__ float weight_tile[BLOCK_K][BLOCK_N + 1];
    __shared__ int64_t input_offset[BLOCK_M];   // of a row's first element, -1 for zeros
    __shared__ int64_t weight_offset[BLOCK_N];  // of a weight row's first element, -1 past N

    wait_for_predecessors();
    allow_dependents();

    // 1. Find this block's rows, and where they and the weights lie.
    RowTile tile;
    if (!find_row_tile(args, blockIdx.x, tile)) return;  // the whole block leaves
    const int64_t column_tile = blockIdx.y;
    for (int i = threadIdx.x; i < BLOCK_M; i += kThreads) {
        const int64_t row = tile.begin + i;
        int64_t input_row = row < tile.end ? row : -1;
        if (row < tile.end && args.sorted_slots != nullptr) {
            const int32_t slot = args.sorted_slots[row];
            input_row = slot >= 0 ? slot / args.slots_per_token : -1;
        }
        const bool exists = input_row >= 0 && input_row < args.num_input_rows;
        input_offset[i] = exists ? input_row * args.input_stride : -1;
    }
    for (int i = threadIdx.x; i < BLOCK_N; i += kThreads) {
        const int64_t row = weight_row(args, column_tile, i);
        weight_offset[i] = row < args.n ? tile.group * args.group_stride + row * args.n_stride : -1;
    }

    // 2. Multiply, one slice along K after the other.
    const Element* input = static_cast<const Element*>(args.input);
    const Element* weights = static_cast<const Element*>(args.weights);
    const bool is_k_contiguous = args.k_stride == 1;
    const int thread_row = threadIdx.x / kSide;
    const int thread_column = threadIdx.x % kSide;
    float sum[kRowsPerThread][kColumnsPerThread] = {};
    for (int64_t k = 0; k < args.k_dim; k += BLOCK_K) {
        const int depth = static_cast<int>(min(int64_t{BLOCK_K}, args.k_dim - k));
        __syncthreads();  // offsets are there, and nobody reads the previous slice any more
        for (int i = threadIdx.x; i < BLOCK_M * BLOCK_K; i += kThreads) {
            const int row = i / BLOCK_K, d = i % BLOCK_K;
            const int64_t offset = input_offset[row];
            input_tile[d][row] = offset >= 0 && d < depth ? to_float(input[offset + k + d]) : 0.0f;
        }
        for (int i = threadIdx.x; i < BLOCK_N * BLOCK_K; i += kThreads) {
            // Neighbouring threads read along the contiguous dimension.
            const int column = is_k_contiguous ? i / BLOCK_K : i % BLOCK_N;
            const int d = is_k_contiguous ? i % BLOCK_K : i / BLOCK_N;
            const int64_t offset = weight_offset[column];
            weight_tile[d][column] = offset >= 0 && d < depth
                                         ? to_float(weights[offset + (k + d) * args.k_stride])
                                         : 0.0f;
        }
        __syncthreads();  // the slice is there
        for (int d = 0; d < depth; ++d) {
#pragma unroll
            for (int m = 0; m < kRowsPerThread; ++m)
#pragma unroll
                for (int n = 0; n < kColumnsPerThread; ++n)
                    sum[m][n] = __fmaf_rn(input_tile[d][thread_row + m * kSide],
                                          weight_tile[d][thread_column + n * kSide], sum[m][n]);
        }
    }

    // 3. Add the bias, activate and store. A thread's columns n and n + kColumnsPerThread / 2 of a
    //    gated tile are gate and up of one feature.
    const bool is_gated = args.config.activation != Activation::kNone;
    const int64_t num_columns = is_gated ? args.n / 2 : args.n;
    const int tile_columns = is_gated ? BLOCK_N / 2 : BLOCK_N;
    if (args.bias != nullptr) {
#pragma unroll
        for (int n = 0; n < kColumnsPerThread; ++n) {
            const int64_t row = weight_row(args, column_tile, thread_column + n * kSide);
            const float bias = row < args.n ? load_bias(args, tile.group, row) : 0.0f;
#pragma unroll
            for (int m = 0; m < kRowsPerThread; ++m) sum[m][n] = __fadd_rn(sum[m][n], bias);
        }
    }
#pragma unroll
    for (int m = 0; m < kRowsPerThread; ++m) {
        const int64_t row = tile.begin + thread_row + m * kSide;
#pragma unroll
        for (int n = 0; n < kColumnsPerThread; ++n) {
            const int tile_column = thread_column + n * kSide;
            const int64_t column = column_tile * tile_columns + tile_column;
            if (row >= tile.end || tile_column >= tile_columns || column >= num_columns) continue;
            float x = sum[m][n];
            // The other half's n exists wherever a gated tile has this column.
            if (is_gated)
                x = activate(x, sum[m][(n + kColumnsPerThread / 2) % kColumnsPerThread],
                             args.config);
            store_output(args, row, column, x);
        }
    }
}

}  // namespace

void simple_grouped_gemm(const GroupedGemmArgs& args, Stream stream) {
    // Every group that has rows can end in one tile that is not full.
    const int64_t row_tiles =
        args.num_rows / BLOCK_M + std::min<int64_t>(args.num_rows, args.num_groups);
    const int64_t num_columns = is_gated(args.config.activation) ? args.n / 2 : args.n;
    const int64_t tile_columns = is_gated(args.config.activation) ? BLOCK_N / 2 : BLOCK_N;
    const dim3 grid(static_cast<unsigned>(row_tiles),
                    static_cast<unsigned>(ceil_div(num_columns, tile_columns)));
    const auto kernel = args.dtype == DType::kBFloat16 ? grouped_gemm_kernel<__nv_bfloat16>
                                                       : grouped_gemm_kernel<float>;
    launch_dependent("grouped_gemm", kernel, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace moecore::cuda
