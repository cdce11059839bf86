// Causal attention of new tokens to a paged cache.
//
//   reads   keys and values of each sequence up to its last token, once for every 16 * kWarps rows;
//           a row is one query head of one token, and the heads that share keys are neighbours
//   writes  T * Hq * D * 2 bytes of output
//
// A cluster of blocks makes one tile of rows of one sequence and one head of the cache. Positions
// are cut into splits of 256, by absolute position: block r of a cluster of c takes the splits r,
// r + c, ..., each from nothing, 64 positions a step; after every round the cluster adds the c
// results to the row's total in the order of the splits. So neither the cluster's size nor the
// tile's other rows change the bits of a row, and short batches use many multiprocessors without
// memory or atomics between them. The grid depends on T and S only: it can be captured in a graph.
// Needs sm_80; clusters of more than one block sm_90.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "attention/attend.cuh"
#include "attention/row_tile.cuh"
#include "common/cluster.cuh"
#include "common/kv_batch.cuh"
#include "common/launch.cuh"
#include "common/mma_sm80.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/paged_attention.hpp"

namespace moecore::cuda {
namespace {

constexpr int kBlocksPerSplit = 4;
constexpr int kMaxCluster = 8;
constexpr int kTilesWanted = 264;  ///< blocks of a grid that fills the GPU: two for each of 132
constexpr float kLog2e = 1.44269504088896341f;

/// Shared memory of a block. kD: the head's size, rounded up.
template <int kD, int kWarps>
struct Shared {
    static constexpr int kRows = kWarpRows * kWarps;
    static constexpr int kStages = kD <= 64 ? 4 : kD <= 128 && kWarps == 1 ? 3 : 2;
    __nv_bfloat16 query[kRows * kD];
    __nv_bfloat16 key[kStages][kBlock * kD];
    __nv_bfloat16 value[kStages][kBlock * kD];
    float result[kRows * kD];  ///< of the split, read by the whole cluster
    float total[kRows * kD];   ///< of all splits so far: this block's share of the columns
    float result_max[kRows], result_sum[kRows];
    float total_max[kRows], total_sum[kRows];
    float scale_total[kRows][kMaxCluster], scale_result[kRows][kMaxCluster];
};

/// Leaves a split's result for the cluster.
template <int kD, int kWarps>
__device__ void store_result(const Accumulator<kD>& acc, int lane, int warp,
                             Shared<kD, kWarps>& shared) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * kWarpRows + half * 8 + lane / 4;
        float sum = acc.sum[half];
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
        if (lane % 4 == 0) {
            shared.result_max[row] = acc.max[half];
            shared.result_sum[row] = sum;
        }
#pragma unroll
        for (int d = 0; d < kD / 8; ++d)
            *reinterpret_cast<float2*>(&shared.result[row * kD + d * 8 + lane % 4 * 2]) =
                make_float2(acc.output[d][2 * half], acc.output[d][2 * half + 1]);
    }
}

/// Adds the results of `count` blocks of the cluster to the rows' totals, in order. This block adds
/// the columns from begin to end - 1; sums and maxima every block adds.
template <int kD, int kWarps>
__device__ void add_results(int count, int begin, int end, Shared<kD, kWarps>& shared) {
    constexpr int kThreads = kWarps * kWarpSize;
    constexpr int kRows = Shared<kD, kWarps>::kRows;
    for (int row = threadIdx.x; row < kRows; row += kThreads) {
        float max = shared.total_max[row], sum = shared.total_sum[row];
        for (int b = 0; b < count; ++b) {
            const float other_max = load_from_cluster(&shared.result_max[row], b);
            const float larger = fmaxf(max, other_max);
            const float base = larger == minus_infinity() ? 0.0f : larger;
            const float own = exp2_fast(max - base), other = exp2_fast(other_max - base);
            sum = fmaf(sum, own, load_from_cluster(&shared.result_sum[row], b) * other);
            max = larger;
            shared.scale_total[row][b] = own;
            shared.scale_result[row][b] = other;
        }
        shared.total_max[row] = max;
        shared.total_sum[row] = sum;
    }
    __syncthreads();  // the rows' scales are there
    const int width = end - begin;
    for (int i = threadIdx.x; i < kRows * width; i += kThreads) {
        const int row = i / width, column = begin + i % width;
        float total = shared.total[row * kD + column];
        for (int b = 0; b < count; ++b)
            total = fmaf(total, shared.scale_total[row][b],
                         load_from_cluster(&shared.result[row * kD + column], b) *
                             shared.scale_result[row][b]);
        shared.total[row * kD + column] = total;
    }
}

template <int kD, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    paged_attention_kernel(const __grid_constant__ PagedAttentionArgs args) {
    extern __shared__ __align__(128) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<kD, kWarps>*>(memory);
    constexpr int kThreads = kWarps * kWarpSize;
    constexpr int kRows = Shared<kD, kWarps>::kRows;
    constexpr int kStages = Shared<kD, kWarps>::kStages;
    const KvCacheArgs& cache = args.cache;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int cluster = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
    const int group = static_cast<int>(args.num_heads / cache.num_kv_heads);
    const int head = blockIdx.y;
    wait_for_predecessors();
    allow_dependents();
    const RowTile tile = find_tile(cache, args.num_tokens, group, kRows,
                                   static_cast<int>(blockIdx.x) / cluster, lane);
    if (tile.sequence < 0) return;  // the whole cluster

    // 1. Which blocks of the cache the tile needs, and the first of them on their way.
    const int last_row = min(tile.first + kRows, tile.num_rows) - 1;
    const int context = tile.first_position + last_row / group + 1;
    const int num_blocks = ceil_div(context, kBlock);
    const int num_splits = ceil_div(num_blocks, kBlocksPerSplit);
    const auto next = [&](int block) {
        return block + (block % kBlocksPerSplit < kBlocksPerSplit - 1
                            ? 1
                            : 1 + (cluster - 1) * kBlocksPerSplit);
    };
    int incoming = rank * kBlocksPerSplit, stage = 0;
    int64_t place = incoming < num_blocks ? cache_block(cache, tile.sequence, incoming) : -1;
    const auto copy_next = [&](int to_stage) {
        if (incoming < num_blocks) {
            copy_block<kD, kWarps>(cache, place, incoming, head, context, shared.key[to_stage],
                                   shared.value[to_stage]);
            incoming = next(incoming);
            if (incoming < num_blocks) place = cache_block(cache, tile.sequence, incoming);
        }
        commit_copies();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) copy_next(s);

    // 2. The rows' queries, and totals of nothing.
    const uint32_t query = shared_address(shared.query);
    for (int i = threadIdx.x; i < kRows * (kD / 8); i += kThreads) {
        const int row = i / (kD / 8), chunk = i % (kD / 8), q = tile.first + row;
        uint4 words = {};
        if (q < tile.num_rows && chunk * 8 < cache.head_dim)
            words = *reinterpret_cast<const uint4*>(
                static_cast<const __nv_bfloat16*>(args.query) +
                (tile.first_token + q / group) * args.query_strides.token +
                (int64_t{head} * group + q % group) * args.query_strides.head + chunk * 8);
        *reinterpret_cast<uint4*>(reinterpret_cast<char*>(shared.query) +
                                  chunk_offset<kD>(row, chunk)) = words;
    }
    for (int i = threadIdx.x; i < kRows * kD; i += kThreads) shared.total[i] = 0.0f;
    for (int row = threadIdx.x; row < kRows; row += kThreads) {
        shared.total_max[row] = minus_infinity();
        shared.total_sum[row] = 0.0f;
    }
    int position[2];  // of this lane's rows; rows past the last see what the last sees
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int q = min(tile.first + warp * kWarpRows + half * 8 + lane / 4, last_row);
        position[half] = tile.first_position + q / group;
    }

    // 3. Rounds of one split for each block of the cluster.
    const int share = kD / cluster, begin = rank * share;
    for (int round = 0; round * cluster < num_splits; ++round) {
        const int split = round * cluster + rank;
        Accumulator<kD> acc;
        const int last = min((split + 1) * kBlocksPerSplit, num_blocks);
        for (int block = split * kBlocksPerSplit; block < last; ++block) {
            wait_for_copies<kStages - 2>();
            __syncthreads();  // the block is there for all, and the stage before it is free
            copy_next((stage + kStages - 1) % kStages);
            attend<kD>(query + chunk_offset<kD>(warp * kWarpRows, 0),
                       shared_address(shared.key[stage]), shared_address(shared.value[stage]),
                       args.scale * kLog2e, lane, block * kBlock, position, acc);
            stage = (stage + 1) % kStages;
        }
        if (split < num_splits) store_result(acc, lane, warp, shared);
        cluster_sync();  // every result of the round is there
        add_results<kD, kWarps>(min(num_splits - round * cluster, cluster), begin, begin + share,
                                shared);
        cluster_sync();  // nobody reads the results any more
    }

    // 4. Divide and store. Adding 0 makes one zero of both.
    const int64_t width = min(int64_t{begin + share}, cache.head_dim) - begin;
    for (int i = threadIdx.x; i < kRows * share; i += kThreads) {
        const int row = i / share, column = begin + i % share, q = tile.first + row;
        if (q > last_row || column - begin >= width) continue;
        const float x = __fdiv_rn(shared.total[row * kD + column], shared.total_sum[row]) + 0.0f;
        static_cast<__nv_bfloat16*>(
            args.output)[(tile.first_token + q / group) * args.output_strides.token +
                         (int64_t{head} * group + q % group) * args.output_strides.head + column] =
            __float2bfloat16_rn(x);
    }
}

template <int kD, int kWarps>
void launch(const PagedAttentionArgs& args, Stream stream) {
    // Tiles of all sequences, at most: a sequence of n tokens has ceil(n * group / rows).
    const int64_t rows = Shared<kD, kWarps>::kRows;
    const int64_t group = args.num_heads / args.cache.num_kv_heads;
    const int64_t tiles = std::min(args.num_tokens * ceil_div(group, rows),
                                   args.num_tokens * group / rows + args.cache.num_sequences);
    int64_t cluster = is_sm90() ? kMaxCluster : 1;
    while (cluster > 1 && tiles * args.cache.num_kv_heads * cluster > kTilesWanted) cluster /= 2;
    const auto kernel = paged_attention_kernel<kD, kWarps>;
    constexpr auto kBytes = sizeof(Shared<kD, kWarps>);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "cudaFuncSetAttribute");
    const dim3 grid(static_cast<unsigned>(tiles * cluster),
                    static_cast<unsigned>(args.cache.num_kv_heads));
    launch_dependent_clusters("paged_attention", kernel, grid, dim3(kWarps * kWarpSize),
                              static_cast<unsigned>(cluster), kBytes, stream, args);
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, Stream stream) {
    if (args.num_tokens == 0 || args.cache.num_sequences == 0) return;  // an empty grid is an error
    // With one token a sequence there is little to share between warps, else keys and values.
    const bool is_decode = args.num_tokens <= args.cache.num_sequences;
    const auto head_dim = static_cast<int>(args.cache.head_dim);
    dispatch_at_least(head_dim, std::integer_sequence<int, 64, 128, 256>{}, [&](auto size) {
        if (is_decode)
            launch<size(), 1>(args, stream);
        else
            launch<size(), size() == 256 ? 2 : 4>(args, stream);
    });
}

}  // namespace moecore::cuda
