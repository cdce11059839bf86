#pragma once

// The thin kernel: a block makes one tile of 16 to 64 weight rows and up to 128 rows of input. One
// warp has the copy engine load both, four multiply.

#include "common/launch.cuh"
#include "common/ptx_sm90.cuh"
#include "grouped_gemm/thin_epilogue.cuh"

namespace moecore::cuda::sm90 {

struct ThinRing {
    uint64_t full[kThinMaxStages];
    uint64_t empty[kThinMaxStages];
};

/// A place in the ring, and the parity of its phase.
class ThinStage {
public:
    __device__ ThinStage(const ThinParams& params, uint32_t ring, ThinRing& state)
        : params_(params), ring_(ring), state_(state) {}

    __device__ void advance() {
        if (++index_ == params_.config.num_stages) {
            index_ = 0;
            parity_ ^= 1u;
        }
    }
    __device__ uint32_t weights() const { return ring_ + index_ * params_.stage_bytes; }
    __device__ uint32_t rows() const {
        return weights() + params_.config.stage_depth * params_.config.weight_rows * kRowBytes;
    }
    __device__ uint32_t full() const { return ptx::shared_address(&state_.full[index_]); }
    __device__ uint32_t empty() const { return ptx::shared_address(&state_.empty[index_]); }
    __device__ void wait_full() const { ptx::barrier_wait(full(), parity_); }
    /// The first pass through the ring finds it empty.
    __device__ void wait_empty() const { ptx::barrier_wait(empty(), parity_ ^ 1u); }

private:
    const ThinParams& params_;
    uint32_t ring_;
    ThinRing& state_;
    int index_ = 0;
    uint32_t parity_ = 0;
};

/// One thread. Weights that no kernel before this one writes are on their way while it still runs.
template <bool kIsGated>
__device__ void thin_produce(const ThinParams& params, const CUtensorMap& weights_map,
                             const CUtensorMap& rows_map, ThinStage stage) {
    const ThinConfig& config = params.config;
    const int num_stages = ceil_div(params.num_k_blocks, config.stage_depth);
    const int first_stages = min(num_stages, config.num_stages);  // that find the ring empty
    const int eights = static_cast<int>(blockIdx.x) * (config.weight_rows / (kIsGated ? 16 : 8));
    const int first_row = static_cast<int>(blockIdx.y) * config.max_tokens;
    const ptx::Keep keep = params.are_weights_shared ? ptx::Keep::kNormal : ptx::Keep::kBriefly;
    const auto copy_weights = [&](const ThinStage& to, int index) {
        ptx::barrier_arrive_expect(to.full(), params.stage_bytes);
        const int box[5] = {0, 0, kIsGated ? 0 : eights, kIsGated ? eights : 0,
                            index * config.stage_depth};
        ptx::copy_box(to.weights(), weights_map, box, to.full(), keep);
    };
    const auto copy_rows = [&](const ThinStage& to, int index) {
        const int box[5] = {0, first_row, index * config.stage_depth, 0, 0};
        ptx::copy_box(to.rows(), rows_map, box, to.full(), ptx::Keep::kNormal);
    };
    const bool begins_early = params.args.settled != Settled::kNothing;
    if (!begins_early) wait_for_predecessors();
    ThinStage ahead = stage;
    for (int i = 0; i < first_stages; ++i, ahead.advance()) copy_weights(ahead, i);
    if (begins_early) wait_for_predecessors();
    for (int i = 0; i < num_stages; ++i, stage.advance()) {
        if (i >= first_stages) {
            stage.wait_empty();
            copy_weights(stage, i);
        }
        copy_rows(stage, i);
    }
}

/// sums += the tile's weight rows @ kWidth rows of input, over all of K.
template <int kWidth>
__device__ __forceinline__ void thin_multiply(const ThinParams& params, ThinStage stage,
                                              float (&sums)[kThinMaxTokens / 2]) {
    const ThinConfig& config = params.config;
    const bool is_leader = threadIdx.x % kWarpSize == 0;
    const int last_of_stage = config.stage_depth - 1;  // a mask, too
    uint32_t weights = 0, rows = 0, held = 0;
    for (int k = 0; k < params.num_k_blocks; ++k) {
        if ((k & last_of_stage) == 0) {
            stage.wait_full();
            weights = stage.weights();
            rows = stage.rows();
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step)
            ptx::wgmma<kWidth>(sums, ptx::swizzled_tile(weights + step * 32),
                               ptx::swizzled_tile(rows + step * 32));
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (held != 0 && is_leader) ptx::barrier_arrive(held);
        held = 0;
        if ((k & last_of_stage) == last_of_stage) {
            held = stage.empty();
            stage.advance();
        }
        weights += config.weight_rows * kRowBytes;
        rows += config.max_tokens * kRowBytes;
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(sums);
}

/// With the instruction's width for the tile's rows.
__device__ __forceinline__ void thin_multiply(const ThinParams& params, ThinStage stage,
                                              float (&sums)[kThinMaxTokens / 2]) {
    switch (params.config.max_tokens) {
        case 8:
            return thin_multiply<8>(params, stage, sums);
        case 16:
            return thin_multiply<16>(params, stage, sums);
        case 24:
            return thin_multiply<24>(params, stage, sums);
        case 32:
            return thin_multiply<32>(params, stage, sums);
        case 48:
            return thin_multiply<48>(params, stage, sums);
        case 64:
            return thin_multiply<64>(params, stage, sums);
        case 96:
            return thin_multiply<96>(params, stage, sums);
        default:
            return thin_multiply<128>(params, stage, sums);
    }
}

template <Activation kActivation>
__device__ void thin_consume(const ThinParams& params, const ThinStage& stage, int warp, int lane) {
    constexpr bool kIsGated = kActivation != Activation::kNone;
    const GroupedGemmArgs& args = params.args;
    const ThinPlace<kIsGated> place(params, warp);
    float bias[2];
    thin_bias<kIsGated>(args, place.first_column, lane, bias);
    float sums[kThinMaxTokens / 2] = {};
    thin_multiply(params, stage, sums);
    ptx::named_barrier(1, kGroupThreads);  // nobody reads the ring any more
    if (warp * 16 >= params.config.weight_rows) return;

    const auto value = [&](int half, int eight, int i) {
        const auto sum = [&](int h) { return __fadd_rn(sums[eight * 4 + h * 2 + i], bias[h]); };
        if constexpr (kIsGated)
            return Epilogue<kActivation>(args.config)(sum(0), sum(1));
        else
            return sum(half);
    };
    if (args.output_dtype == DType::kBFloat16)
        thin_store_bfloat16(params, place, stage.weights() + warp * (kThinMaxTokens * 32), lane,
                            value);
    else
        thin_store_float32(params, place, lane, value);
}

template <Activation kActivation>
__global__ void __launch_bounds__(kThinThreads, 2)
    thin_gemm_kernel(const __grid_constant__ ThinParams params,
                     const __grid_constant__ CUtensorMap weights_map,
                     const __grid_constant__ CUtensorMap rows_map) {
    extern __shared__ uint8_t shared[];
    __shared__ ThinRing state;
    constexpr uint32_t kAlignment = 1024;  // of the swizzle
    const uint32_t ring = ceil_div(ptx::shared_address(shared), kAlignment) * kAlignment;
    const ThinStage stage(params, ring, state);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    load_parameters(params);
    if (threadIdx.x == 0) {
        ptx::prefetch_map(weights_map);
        ptx::prefetch_map(rows_map);
        for (int i = 0; i < params.config.num_stages; ++i) {
            ptx::barrier_init(ptx::shared_address(&state.full[i]), 1);
            ptx::barrier_init(ptx::shared_address(&state.empty[i]), kGroupThreads / kWarpSize);
        }
        ptx::fence_barrier_init();
    }
    __syncthreads();  // barriers exist
    if (warp == kGroupThreads / kWarpSize) {
        if (lane == 0)
            thin_produce<kActivation != Activation::kNone>(params, weights_map, rows_map, stage);
    } else {
        wait_for_predecessors();
        allow_dependents();
        thin_consume<kActivation>(params, stage, warp, lane);
    }
}

}  // namespace moecore::cuda::sm90
