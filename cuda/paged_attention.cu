// Causal attention of new tokens to a paged cache.
//
//   reads   keys and values of each sequence up to its last token, once for every tile of rows; a
//           row is one query head of one token, and the heads that share keys are neighbours
//   writes  T * Hq * D * 2 bytes of output
//
// A cluster of blocks makes one tile of rows of one sequence and one head of the cache. Positions
// are cut into splits of 256, by absolute position: block r of a cluster of c takes the splits r,
// r + c, ..., each from nothing, 64 positions a step; after every round the cluster adds the c
// results to the row's total in the order of the splits. So neither the cluster's size nor the
// tile's other rows change the bits of a row, and short batches use many multiprocessors without
// memory or atomics between them. The grid depends on T and S only: it can be captured in a graph.
// Needs sm_80; clusters of more than one block, and heads above 128, sm_90.

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

/// Shared memory of a block. kD: the head's size, rounded up. kRowWarps: how many warps have rows
/// of their own; with 1, four warps share 16 rows.
template <int kD, int kRowWarps>
struct Shared {
    static constexpr int kRows = kWarpRows * kRowWarps;
    static constexpr int kThreads = (kRowWarps == 1 ? 4 : kRowWarps) * kWarpSize;
    static constexpr int kStages = kD <= 64 ? 4 : 2;
    __nv_bfloat16 query[kRows * kD];
    __nv_bfloat16 key[kStages][kBlock * kD];
    __nv_bfloat16 value[kStages][kBlock * kD];
    float result[kRows * kD];  ///< of the split, read by the whole cluster
    float total[kRows * kD];   ///< of all splits so far: this block's share of the columns
    float result_max[kRows], result_sum[kRows];
    float total_max[kRows], total_sum[kRows];
    float scale_total[kRows][kMaxCluster], scale_result[kRows][kMaxCluster];
    float quarter_sum[4][kRows];
    SharedStep step;
};

/// Leaves a split's result for the cluster: of rows row, row + 8 and the columns from `column` on.
/// Sums of quarters from `quarter` on go to quarter_sum.
template <int kD, int kRowWarps, int kWidth, int kQuarters>
__device__ void store_result(const Accumulator<kWidth, kQuarters>& acc, int row, int column,
                             int quarter, int lane, Shared<kD, kRowWarps>& shared) {
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
#pragma unroll
        for (int i = 0; i < kQuarters; ++i) {
            float sum = acc.sum[half][i];
            sum += __shfl_xor_sync(kFullMask, sum, 1);
            sum += __shfl_xor_sync(kFullMask, sum, 2);
            if (lane % 4 == 0) shared.quarter_sum[quarter + i][row] = sum;
        }
        if (lane % 4 == 0 && quarter == 0) shared.result_max[row] = acc.max[half];
#pragma unroll
        for (int d = 0; d < kWidth / 8; ++d)
            *reinterpret_cast<float2*>(&shared.result[row * kD + column + d * 8 + lane % 4 * 2]) =
                make_float2(acc.output[d][2 * half], acc.output[d][2 * half + 1]);
    }
}

/// Adds the results of `count` blocks of the cluster to the rows' totals, in order. This block adds
/// 2^share_log2 columns from `begin` on; sums and maxima every block adds.
template <int kD, int kRowWarps>
__device__ void add_results(int count, int begin, int share_log2, Shared<kD, kRowWarps>& shared) {
    constexpr int kThreads = Shared<kD, kRowWarps>::kThreads;
    constexpr int kRows = Shared<kD, kRowWarps>::kRows;
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
    for (int i = threadIdx.x * 4; i < kRows << share_log2; i += kThreads * 4) {
        const int row = i >> share_log2, column = begin + (i & ((1 << share_log2) - 1));
        auto* target = reinterpret_cast<float4*>(&shared.total[row * kD + column]);
        const auto* source = reinterpret_cast<const float4*>(&shared.result[row * kD + column]);
        float4 total = *target;
        for (int b = 0; b < count; ++b) {
            const float4 result = load_from_cluster(source, b);
            const float own = shared.scale_total[row][b], other = shared.scale_result[row][b];
            total.x = fmaf(total.x, own, result.x * other);
            total.y = fmaf(total.y, own, result.y * other);
            total.z = fmaf(total.z, own, result.z * other);
            total.w = fmaf(total.w, own, result.w * other);
        }
        *target = total;
    }
}

template <int kD, int kRowWarps>
__global__ void __launch_bounds__(Shared<kD, kRowWarps>::kThreads)
    paged_attention_kernel(const __grid_constant__ PagedAttentionArgs args) {
    extern __shared__ __align__(128) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<kD, kRowWarps>*>(memory);
    constexpr int kThreads = Shared<kD, kRowWarps>::kThreads;
    constexpr int kRows = Shared<kD, kRowWarps>::kRows;
    constexpr int kStages = Shared<kD, kRowWarps>::kStages;
    const KvCacheArgs& cache = args.cache;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int rank = static_cast<int>(cluster_rank());
    int cluster = static_cast<int>(cluster_size());
    const int group = static_cast<int>(args.num_heads / cache.num_kv_heads);
    const int head = blockIdx.y;
    bool is_waiting = true;
    const auto wait = [&] {  // for what the kernels ahead write
        if (!is_waiting) return;
        is_waiting = false;
        wait_for_predecessors();
        allow_dependents();
    };
    load_parameters(args);
    if (!cache.is_settled) wait();
    const RowTile tile = find_tile(cache, args.num_tokens, group, kRows,
                                   static_cast<int>(blockIdx.x) / cluster, lane);
    if (tile.sequence < 0) return wait();  // the whole cluster

    // 1. Which blocks of the cache the tile needs, and the first of them on their way.
    const int last_row = min(tile.first + kRows, tile.num_rows) - 1;
    const int context = tile.first_position + last_row / group + 1;
    const int num_blocks = ceil_div(context, kBlock);
    const int num_splits = ceil_div(num_blocks, kBlocksPerSplit);
    if (num_splits == 1) {  // nothing to add up: one block does it, and the others leave
        if (rank > 0) return wait();
        cluster = 1;
    }
    const auto next = [&](int block) {
        return block + (block % kBlocksPerSplit < kBlocksPerSplit - 1
                            ? 1
                            : 1 + (cluster - 1) * kBlocksPerSplit);
    };
    int incoming = rank * kBlocksPerSplit, stage = 0;
    int64_t place = incoming < num_blocks ? cache_block(cache, tile.sequence, incoming) : -1;
    const auto copy_next = [&](int to_stage) {
        if (incoming < num_blocks) {
            if ((incoming + 1) * kBlock > tile.first_position) wait();  // it has new tokens
            copy_block<kD, kThreads>(cache, place, incoming, head, context, shared.key[to_stage],
                                     shared.value[to_stage]);
            incoming = next(incoming);
            if (incoming < num_blocks) place = cache_block(cache, tile.sequence, incoming);
        }
        commit_copies();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) copy_next(s);

    // 2. The rows' queries, and totals of nothing.
    wait();
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
    constexpr bool kTogether = kRowWarps == 1;
    const int first_row = kTogether ? 0 : warp * kWarpRows;  // of this warp, in the tile
    int position[2];  // of this lane's rows; rows past the last see what the last sees
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int q = min(tile.first + first_row + half * 8 + lane / 4, last_row);
        position[half] = tile.first_position + q / group;
    }

    // 3. Rounds of one split for each block of the cluster.
    const int share = kD / cluster, begin = rank * share, share_log2 = 31 - __clz(share);
    for (int round = 0; round * cluster < num_splits; ++round) {
        const int split = round * cluster + rank;
        Accumulator<kTogether ? kD / 4 : kD, kTogether ? 1 : 4> acc;
        const int last = min((split + 1) * kBlocksPerSplit, num_blocks);
        for (int block = split * kBlocksPerSplit; block < last; ++block) {
            wait_for_copies<kStages - 2>();
            __syncthreads();  // the block is there for all, and the stage before it is free
            copy_next((stage + kStages - 1) % kStages);
            const uint32_t key = shared_address(shared.key[stage]);
            const uint32_t value = shared_address(shared.value[stage]);
            if constexpr (kTogether)
                attend_together<kD>(query, key, value, args.scale * kLog2e, lane, warp,
                                    block * kBlock, position, shared.step, acc);
            else
                attend<kD>(query + chunk_offset<kD>(first_row, 0), key, value, args.scale * kLog2e,
                           lane, block * kBlock, position, acc);
            stage = (stage + 1) % kStages;
        }
        if (split < num_splits)
            store_result(acc, first_row + lane / 4, kTogether ? warp * (kD / 4) : 0,
                         kTogether ? warp : 0, lane, shared);
        __syncthreads();  // every quarter's sum is there
        for (int row = threadIdx.x; row < kRows; row += kThreads)
            shared.result_sum[row] = (shared.quarter_sum[0][row] + shared.quarter_sum[1][row]) +
                                     (shared.quarter_sum[2][row] + shared.quarter_sum[3][row]);
        cluster_sync();  // every result of the round is there
        add_results<kD, kRowWarps>(min(num_splits - round * cluster, cluster), begin, share_log2,
                                   shared);
        cluster_sync();  // nobody reads the results any more
    }

    // 4. Divide and store. Adding 0 makes one zero of both.
    for (int i = threadIdx.x * 4; i < kRows << share_log2; i += kThreads * 4) {
        const int row = i >> share_log2, column = begin + (i & (share - 1)), q = tile.first + row;
        if (q > last_row || column >= cache.head_dim) continue;
        const float4 total = *reinterpret_cast<const float4*>(&shared.total[row * kD + column]);
        const float sum = shared.total_sum[row];
        const int token = q / group;
        auto* output = static_cast<__nv_bfloat16*>(args.output) +
                       (tile.first_token + token) * args.output_strides.token +
                       (int64_t{head} * group + q - token * group) * args.output_strides.head +
                       column;
        *reinterpret_cast<uint2*>(output) = make_uint2(
            pack_bfloat16(__fdiv_rn(total.x, sum) + 0.0f, __fdiv_rn(total.y, sum) + 0.0f),
            pack_bfloat16(__fdiv_rn(total.z, sum) + 0.0f, __fdiv_rn(total.w, sum) + 0.0f));
    }
}

template <int kD, int kRowWarps>
void launch(const PagedAttentionArgs& args, Stream stream) {
    // Tiles of all sequences, at most: a sequence of n tokens has ceil(n * group / rows).
    const int64_t rows = Shared<kD, kRowWarps>::kRows;
    const int64_t group = args.num_heads / args.cache.num_kv_heads;
    const int64_t tiles = std::min(args.num_tokens * ceil_div(group, rows),
                                   args.num_tokens * group / rows + args.cache.num_sequences);
    int64_t cluster = is_sm90() ? kMaxCluster : 1;
    // Clusters of eight pack badly: two for each multiprocessor would not run at once.
    const auto wanted = [&] { return cluster == kMaxCluster ? kTilesWanted / 2 : kTilesWanted; };
    while (cluster > 1 && tiles * args.cache.num_kv_heads * cluster > wanted()) cluster /= 2;
    const auto kernel = paged_attention_kernel<kD, kRowWarps>;
    constexpr auto kBytes = sizeof(Shared<kD, kRowWarps>);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "cudaFuncSetAttribute");
    const dim3 grid(static_cast<unsigned>(tiles * cluster),
                    static_cast<unsigned>(args.cache.num_kv_heads));
    launch_dependent_clusters("paged_attention", kernel, grid,
                              dim3(Shared<kD, kRowWarps>::kThreads), static_cast<unsigned>(cluster),
                              kBytes, stream, args);
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, Stream stream) {
    if (args.num_tokens == 0 || args.cache.num_sequences == 0) return;  // an empty grid is an error
    // With one token a sequence, warps have 16 rows to share; with more, keys and values.
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
