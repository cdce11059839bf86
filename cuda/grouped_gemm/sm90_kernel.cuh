#pragma once

// The kernel: one warpgroup of producers, and consumers that multiply, activate and store.

#include "common/launch.cuh"
#include "grouped_gemm/sm90_epilogue.cuh"
#include "grouped_gemm/sm90_producers.cuh"

namespace moecore::cuda::sm90 {

/// Registers a thread after they moved from producers to consumers; only where one block fills a
/// multiprocessor.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;

template <typename Shape>
using Sums = float[Shape::kBlocks][Shape::kMaxTokens / 2];

/// sums += this warpgroup's weight rows @ kWidth rows of input, over all of K. Leaves `stage` past
/// the tile; the stage before it is still held.
template <int kWidth, typename Shape>
__device__ __forceinline__ void multiply(const Params& params, Stage& stage, int consumer,
                                         Sums<Shape>& sums) {
    const bool is_leader = threadIdx.x % kWarpSize == 0;
    int held = -1;
    for (int k = 0; k < params.num_k_blocks; ++k) {
        stage.wait_full();
        ptx::fence_async_proxy();  // rows came by ordinary copies
        ptx::wgmma_fence();
        const uint32_t weights =
            stage.weights() + consumer * (Shape::kWeightBytes / Shape::kConsumers);
        const uint32_t rows = stage.weights() + Shape::kWeightBytes;
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step)
#pragma unroll
            for (int block = 0; block < Shape::kBlocks; ++block)
                ptx::wgmma<kWidth>(sums[block],
                                   ptx::swizzled_tile(weights + block * 64 * kRowBytes + step * 32),
                                   ptx::swizzled_tile(rows + step * 32));
        ptx::wgmma_commit();
        // Products in the queue keep the tensor cores busy, stages given back keep the memory busy.
        // The other warpgroup's products are there in either case.
        if (params.frees_early) {
            ptx::wgmma_wait<0>();
            held = k + 1 < params.num_k_blocks ? stage.index() : -1;
        } else {
            ptx::wgmma_wait<1>();
        }
        if (held >= 0 && is_leader) stage.template release<Shape::kCluster>(held);
        held = stage.index();
        stage.advance();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) ptx::wgmma_results(sums[block]);
}

/// The instruction's width for a tile of num_rows rows: the next multiple of kRowStep. A narrow
/// tile has every multiple of 8 up to 32 and of 16 above.
template <int kWidth, typename Shape>
__device__ __forceinline__ void multiply_rows(const Params& params, Stage& stage, int consumer,
                                              int num_rows, Sums<Shape>& sums) {
    if constexpr (kWidth < Shape::kMaxTokens) {
        if (num_rows > kWidth) {
            constexpr int kStep = kWidth < 32 ? Shape::kRowStep : 16;
            return multiply_rows<kWidth + kStep, Shape>(params, stage, consumer, num_rows, sums);
        }
    }
    multiply<kWidth, Shape>(params, stage, consumer, sums);
}

/// Passes over a tile of which this warpgroup has no weight rows.
template <typename Shape>
__device__ void skip(const Params& params, Stage& stage) {
    const bool is_leader = threadIdx.x % kWarpSize == 0;
    for (int k = 0; k < params.num_k_blocks; ++k) {
        stage.wait_full();
        __syncwarp();
        if (is_leader) stage.template release<Shape::kCluster>(stage.index());
        stage.advance();
    }
}

/// The tile that begins in this stage, read by the thread that gives the stage back.
__device__ inline Tile read_tile(const Stage& stage) {
    Tile tile{};
    if (threadIdx.x % kWarpSize == 0) tile = stage.tile();
    const auto share = [](int value) { return __shfl_sync(0xffffffffu, value, 0); };
    return {share(tile.group), share(tile.first_row), share(tile.num_rows),
            share(tile.weight_tile)};
}

template <Activation kActivation, typename Shape>
__device__ void consume(const Params& params, Stage stage, int consumer) {
    constexpr bool kIsGated = kActivation != Activation::kNone;
    const GroupedGemmArgs& args = params.args;
    const bool is_leader = threadIdx.x % kWarpSize == 0;
    while (true) {
        // 1. The next tile.
        stage.wait_full();
        const Tile tile = read_tile(stage);
        if (tile.group < 0) return;
        const Place<kIsGated, Shape> place(tile, consumer);
        if (place.first_column >= (kIsGated ? args.n / 2 : args.n)) {
            skip<Shape>(params, stage);
            continue;
        }
        float bias[Shape::kBlocks][2];
        load_bias(args, tile, place, bias);

        // 2. Multiply.
        Sums<Shape> sums = {};
        multiply_rows<Shape::kRowStep, Shape>(params, stage, consumer, tile.num_rows, sums);

        // 3. Activate and store. The last stage is held: this warpgroup's weights in it have been
        //    read, by itself alone, and their memory is free.
        const auto value = [&](int block, int half, int eight, int i) {
            const auto sum = [&](int h) {
                return __fadd_rn(sums[block][eight * 4 + h * 2 + i], bias[block][h]);
            };
            if constexpr (kIsGated)
                return Epilogue<kActivation>(args.config)(sum(0), sum(1));
            else
                return sum(half);
        };
        Stage last = stage;
        last.step_back();
        if (args.output_dtype != DType::kBFloat16) {
            store_elements<float>(args, tile, place, value);
        } else if (!params.is_output_aligned) {
            store_elements<__nv_bfloat16>(args, tile, place, value);
        } else {
            const uint32_t staging =
                last.weights() + consumer * (Shape::kWeightBytes / Shape::kConsumers);
            store_bfloat16<kIsGated, Shape>(params, tile, place, staging, consumer, value);
            ptx::fence_async_proxy();  // copies overwrite what was read and written here
        }
        __syncwarp();
        if (is_leader) last.template release<Shape::kCluster>(last.index());
    }
}

template <Activation kActivation, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResidentBlocks)
    grouped_gemm_kernel(const __grid_constant__ Params params,
                        const __grid_constant__ CUtensorMap weights_map,
                        const __grid_constant__ CUtensorMap rows_map) {
    extern __shared__ uint8_t shared[];
    __shared__ RingState state;
    const uint32_t ring = ceil_div(ptx::shared_address(shared), kRingAlignment) * kRingAlignment;
    const Stage stage(params, ring, state);
    const int group = threadIdx.x / kGroupThreads;  // 0 produces
    const int warp = threadIdx.x / kWarpSize;

    // 1. Set up while the kernels before this one may still run.
    load_parameters(params);
    if (threadIdx.x == 0) {
        ptx::prefetch_map(weights_map);
        if (params.copies_rows) ptx::prefetch_map(rows_map);
        const int num_arrivals = 1 + (params.copies_rows ? 0 : kGatherThreads);
        for (int i = 0; i < params.num_stages; ++i) {
            ptx::barrier_init(ptx::shared_address(&state.full[i]), num_arrivals);
            constexpr int kWarps = 4 * Shape::kConsumers;
            ptx::barrier_init(ptx::shared_address(&state.empty[i]), kWarps);
            if constexpr (Shape::kCluster > 1)
                ptx::barrier_init(ptx::shared_address(&state.empty_there[i]),
                                  kWarps * (Shape::kCluster - 1));
        }
        for (int i = 0; i < kClaims; ++i) {
            ptx::barrier_init(ptx::shared_address(&state.claims.full[i]), 1);
            ptx::barrier_init(ptx::shared_address(&state.claims.empty[i]),
                              num_claim_takers<Shape>(params));
        }
        ptx::fence_barrier_init();
    }
    if constexpr (Shape::kCluster > 1)
        cluster_sync();  // barriers exist, in every block
    else
        __syncthreads();  // barriers exist
    const bool waits_itself = params.begins_early && warp == 0;
    if (!waits_itself) {
        wait_for_predecessors();
        allow_dependents();
    }

    // 2. Every warpgroup keeps its role to the end.
    constexpr bool kMovesRegisters =
        Shape::kThreads * kConsumerRegisters > 65536 && Shape::kResidentBlocks == 1;
    if (group == 0) {
        if constexpr (kMovesRegisters) ptx::shrink_registers<kProducerRegisters>();
        if (warp == 0)
            produce_boxes<kActivation != Activation::kNone, Shape>(params, weights_map, rows_map,
                                                                   stage, state.claims);
        else if (!params.copies_rows)
            produce_rows<Shape>(params, stage, state.claims);
    } else {
        if constexpr (kMovesRegisters) ptx::grow_registers<kConsumerRegisters>();
        consume<kActivation, Shape>(params, stage, group - 1);
    }
    if constexpr (Shape::kCluster > 1)
        cluster_sync();  // nobody copies to this block, or arrives at its barriers, any more
}

}  // namespace moecore::cuda::sm90
