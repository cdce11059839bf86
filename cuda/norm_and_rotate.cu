// Norm and rotary position embedding of query and key heads, in place.
//
//   reads   T * n * D * sizeof(element) bytes of heads, T * rotary_dim * 4 of cos_sin
//   writes  T * n * D * sizeof(element) bytes of heads
//
// One warp a head. Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "common/heads.cuh"
#include "common/launch.cuh"
#include "moecore/kernels/norm_and_rotate.hpp"

namespace moecore::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

template <int kPerLane, typename Element, typename Weight>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    norm_and_rotate_kernel(const __grid_constant__ NormAndRotateArgs args) {
    __shared__ float normed[kWarpsPerBlock][kPerLane * kWarpSize];
    const RotaryEmbeddingArgs& rotary = args.rotary;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t index = int64_t{blockIdx.x} * kWarpsPerBlock + warp;
    load_parameters(args);
    wait_for_predecessors();
    allow_dependents();
    if (index >= rotary.num_tokens * rotary.num_heads) return;  // the whole warp
    const int64_t token = index / rotary.num_heads, head = index % rotary.num_heads;
    const RmsNormArgs& norm = head < args.query.num_heads ? args.query : args.key;
    Element* row =
        static_cast<Element*>(rotary.x) + token * rotary.token_stride + head * rotary.head_stride;

    HeadWeights<kPerLane> weights;
    HeadAngles<kPerLane> angles;
    weights.template load<Weight>(norm, lane);
    angles.load(rotary, token, lane);
    normalise_head<Element>(norm, weights, row, lane, normed[warp]);
    __syncwarp();  // the normed head is there
    turn_head(rotary, angles, normed[warp], static_cast<int>(norm.width), lane, row);
}

template <typename Element, typename Weight>
void launch(const NormAndRotateArgs& args, Stream stream) {
    const int64_t num_rows = args.rotary.num_tokens * args.rotary.num_heads;
    dispatch_at_least(
        static_cast<int>(ceil_div(args.query.width, int64_t{kWarpSize})),
        std::integer_sequence<int, 2, 4, 8>{}, [&](auto per_lane) {
            launch_dependent("norm_and_rotate", norm_and_rotate_kernel<per_lane(), Element, Weight>,
                             dim3(static_cast<unsigned>(ceil_div(num_rows, kWarpsPerBlock))),
                             dim3(kWarpsPerBlock * kWarpSize), 0, stream, args);
        });
}

}  // namespace

void norm_and_rotate(const NormAndRotateArgs& args, Stream stream) {
    if (args.rotary.num_tokens * args.rotary.num_heads == 0) return;  // an empty grid is an error
    if (args.query.width > kMaxHeadWidth) {
        rms_norm(args.query, stream);
        rms_norm(args.key, stream);
        rotary_embedding(args.rotary, stream);
    } else if (args.query.dtype == DType::kFloat32) {
        launch<float, float>(args, stream);
    } else if (args.query.weight_dtype == DType::kFloat32) {
        launch<__nv_bfloat16, float>(args, stream);
    } else {
        launch<__nv_bfloat16, __nv_bfloat16>(args, stream);
    }
}

}  // namespace moecore::cuda
