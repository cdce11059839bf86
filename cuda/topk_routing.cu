// Fused score + choice + weights of a router: one warp a token, one pass over memory.
//
//   reads   T * E * sizeof(logit) bytes    router_logits [T, E]; selection_bias [E] from cache
//   writes  T * k * 8 bytes                topk_ids, topk_weights [T, k]
//
// Instructions, not memory, from some thousand tokens on: k rounds of argmax over E / 32 registers
// a lane. Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "common/launch.cuh"
#include "moecore/kernels/topk_routing.hpp"
#include "routing/route_token.cuh"

namespace moecore::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

template <int kPerLane, typename Logit>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    topk_routing_kernel(const __grid_constant__ TopkRoutingArgs args, const bool choose_on_scores,
                        const bool divide_softmax) {
    __shared__ int32_t scratch[kWarpsPerBlock][2 * kPerLane * kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + warp;
    wait_for_predecessors();
    allow_dependents();
    if (token >= args.num_tokens) return;  // a whole warp leaves, so the warp-wide calls stay full

    const Choice choice = route_token<kPerLane, Logit>(args, token, lane, choose_on_scores,
                                                       divide_softmax, scratch[warp]);
    if (lane < args.config.top_k) {
        args.topk_ids[token * args.config.top_k + lane] = choice.expert;
        args.topk_weights[token * args.config.top_k + lane] = choice.weight;
    }
}

template <typename Logit>
bool launch(const TopkRoutingArgs& args, Stream stream) {
    const int64_t blocks = ceil_div(args.num_tokens, kWarpsPerBlock);
    return dispatch_at_least(
        ceil_div(args.num_experts, kWarpSize), std::integer_sequence<int, 1, 2, 4, 8, 16, 32>{},
        [&](auto per_lane) {
            launch_dependent("topk_routing", topk_routing_kernel<per_lane(), Logit>,
                             dim3(static_cast<unsigned>(blocks)), dim3(kWarpsPerBlock * kWarpSize),
                             0, stream, args, args.choose_on_scores(), args.divide_softmax());
        });
}

}  // namespace

void topk_routing(const TopkRoutingArgs& args, Stream stream) {
    if (args.num_tokens == 0) return;  // a grid of 0 blocks is a launch error
    const bool launched = args.logits_dtype == DType::kBFloat16
                              ? launch<__nv_bfloat16>(args, stream)
                              : launch<float>(args, stream);
    if (!launched) throw UnsupportedError("topk_routing: more than 1024 experts");
}

}  // namespace moecore::cuda
