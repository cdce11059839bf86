// topk_routing and sort_by_expert of a few tokens in one launch of one cluster.
//
//   reads   T * E * sizeof(logit) bytes            router_logits [T, E]
//   writes  T * k * 16 bytes, (E_local + 1) * 8    every output of both
//
// Block b of the cluster routes a contiguous range of tokens and then sorts their slots, which none
// but its own threads wrote. Few slots never leave shared memory in between. A multiprocessor
// routes 16 tokens at a time, so with many tokens two launches, the first on all of them, are
// faster. Needs sm_80.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/launch.cuh"
#include "moecore/kernels/route_and_sort.hpp"
#include "routing/route_token.cuh"
#include "routing/sort_slots.cuh"

namespace moecore::cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kMaxBlocks = 8;
constexpr int kMaxExperts =
    256;  ///< beyond, shared memory and registers are too few for one launch
constexpr int64_t kMaxTokens = 256;

template <int kPerLane, typename Logit>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    route_and_sort_kernel(const __grid_constant__ RouteAndSortArgs args,
                          const bool choose_on_scores, const bool divide_softmax) {
    extern __shared__ int32_t shared[];
    __shared__ int4 local_experts[kFewSlots / 4];  // only of few slots
    const TopkRoutingArgs& routing = args.routing;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int num_warps = blockDim.x / kWarpSize;
    const int64_t tokens_per_block = ceil_div(routing.num_tokens, int64_t{gridDim.x});
    const int64_t begin = min(blockIdx.x * tokens_per_block, routing.num_tokens);
    const int64_t end = min(begin + tokens_per_block, routing.num_tokens);
    const int top_k = routing.config.top_k;
    const bool are_few = gridDim.x == 1 && args.sort.num_slots <= kFewSlots;
    load_parameters(args);
    for (int i = threadIdx.x; i < kFewSlots; i += blockDim.x)
        reinterpret_cast<int*>(local_experts)[i] = args.sort.num_local_experts;
    __syncthreads();  // every slot is marked as dropped
    wait_for_predecessors();
    allow_dependents();

    // 1. Route this block's tokens.
    int32_t* scratch = shared + warp * 2 * kPerLane * kWarpSize;
    for (int64_t token = begin + warp; token < end; token += num_warps) {
        const Choice choice = route_token<kPerLane, Logit>(routing, token, lane, choose_on_scores,
                                                           divide_softmax, scratch);
        if (lane < top_k) {
            routing.topk_ids[token * top_k + lane] = choice.expert;
            routing.topk_weights[token * top_k + lane] = choice.weight;
            if (are_few)
                reinterpret_cast<int*>(local_experts)[token * top_k + lane] =
                    local_id(args.sort, choice.expert, args.sort.num_local_experts);
        }
    }
    __syncthreads();  // the block's ids are there, and nobody uses the scratch memory any more

    // 2. Sort their slots.
    if (are_few)
        sort_few_slots(args.sort, local_experts);
    else
        sort_slots(args.sort, begin * top_k, end * top_k, shared);
}

template <typename Logit>
void launch(const RouteAndSortArgs& args, Stream stream) {
    const TopkRoutingArgs& routing = args.routing;
    const int64_t num_warps_needed = std::max<int64_t>(routing.num_tokens, 1);
    unsigned num_blocks = 1;
    if (is_sm90())
        while (num_blocks < kMaxBlocks && num_blocks * kMaxWarps < num_warps_needed)
            num_blocks *= 2;
    const int64_t experts = args.sort.num_local_experts;
    const int num_warps = static_cast<int>(std::clamp<int64_t>(
        std::max(ceil_div(num_warps_needed, int64_t{num_blocks}), ceil_div(experts, kWarpSize)), 1,
        kMaxWarps));
    dispatch_at_least(
        ceil_div(routing.num_experts, kWarpSize), std::integer_sequence<int, 1, 2, 4, 8>{},
        [&](auto per_lane) {
            const size_t route_bytes =
                sizeof(int32_t) * num_warps * 2 * static_cast<size_t>(per_lane()) * kWarpSize;
            const size_t sort_bytes = sort_shared_bytes(num_warps, static_cast<int>(experts));
            launch_dependent_clusters("route_and_sort", route_and_sort_kernel<per_lane(), Logit>,
                                      dim3(num_blocks),
                                      dim3(static_cast<unsigned>(num_warps * kWarpSize)),
                                      num_blocks, std::max(route_bytes, sort_bytes), stream, args,
                                      routing.choose_on_scores(), routing.divide_softmax());
        });
}

}  // namespace

void route_and_sort(const RouteAndSortArgs& args, Stream stream) {
    const bool is_small =
        args.routing.num_tokens <= kMaxTokens && args.routing.num_experts <= kMaxExperts;
    if (!is_small) {
        topk_routing(args.routing, stream);
        sort_by_expert(std::span(&args.sort, 1), stream);
    } else if (args.routing.logits_dtype == DType::kBFloat16) {
        launch<__nv_bfloat16>(args, stream);
    } else {
        launch<float>(args, stream);
    }
}

}  // namespace moecore::cuda
