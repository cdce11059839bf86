// Norm and rotary position embedding of query and key heads; key and value into a paged cache.
//
//   reads   T * (Hq + 2 Hk) * D * 2 bytes of heads, T * rotary_dim * 4 of cos_sin
//   writes  the same of heads (query) and of the cache (key, value)
//
// One warp a head. Key heads go from registers to the cache; qkv keeps them as they were. Where the
// batch is settled, weights, angles and places are read before the wait for what computes the
// heads. Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "common/heads.cuh"
#include "common/kv_batch.cuh"
#include "common/launch.cuh"
#include "moecore/kernels/rotate_and_cache.hpp"

namespace moecore::cuda {
namespace {

using Element = __nv_bfloat16;  // all that a cache on CUDA holds

constexpr int kWarpsPerBlock = 4;
constexpr int kElementsPerVector = 8;  // of 16 bytes

/// The row that a value head, or a key head, of a token takes in the cache.
__device__ Element* cache_target(const KvCacheArgs& cache, void* part, int64_t head, int64_t row) {
    return static_cast<Element*>(part) +
           (head * cache.num_blocks * kKvBlockSize + row) * cache.head_dim;
}

__device__ void copy_head(const Element* source, Element* target, int64_t width, int lane) {
    for (int column = lane * kElementsPerVector; column < width;
         column += kWarpSize * kElementsPerVector)
        *reinterpret_cast<uint4*>(target + column) =
            *reinterpret_cast<const uint4*>(source + column);
}

template <int kPerLane, typename Weight>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    rotate_and_cache_kernel(const __grid_constant__ RotateAndCacheArgs args) {
    __shared__ float values[kWarpsPerBlock][kPerLane * kWarpSize];
    const RotaryEmbeddingArgs& rotary = args.heads.rotary;
    const WriteKvCacheArgs& store = args.store;
    const KvCacheArgs& cache = store.cache;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t num_heads = rotary.num_heads + cache.num_kv_heads;
    const int64_t index = int64_t{blockIdx.x} * kWarpsPerBlock + warp;
    const int64_t token = index / num_heads, head = index % num_heads;
    const bool exists = token < rotary.num_tokens;
    const bool is_query = head < args.heads.query.num_heads, is_value = head >= rotary.num_heads;
    const RmsNormArgs& norm = is_query ? args.heads.query : args.heads.key;

    // 1. What belongs to the batch and the model.
    HeadWeights<kPerLane> weights;
    HeadAngles<kPerLane> angles;
    int64_t row = -1;
    load_parameters(args);
    if (!cache.is_settled) wait_for_predecessors();
    if (exists && !is_query) row = cache_row(cache, token);
    if (exists && !is_value) {
        angles.load(rotary, token, lane);
        if (args.has_norm) weights.template load<Weight>(norm, lane);
    }
    if (cache.is_settled) wait_for_predecessors();
    allow_dependents();
    if (!exists || (!is_query && row < 0)) return;  // the whole warp

    // 2. Values as they are.
    if (is_value) {
        const int64_t value_head = head - rotary.num_heads;
        copy_head(static_cast<const Element*>(store.value) + token * store.value_strides.token +
                      value_head * store.value_strides.head,
                  cache_target(cache, cache.value, value_head, row), cache.head_dim, lane);
        return;
    }

    // 3. Query and key: norm, then turn.
    Element* source =
        static_cast<Element*>(rotary.x) + token * rotary.token_stride + head * rotary.head_stride;
    const int width = static_cast<int>(cache.head_dim);
    if (args.has_norm) {
        normalise_head<Element>(norm, weights, source, lane, values[warp]);
    } else {
        for (int column = lane; column < width; column += kWarpSize)
            values[warp][column] = to_float(source[column]);
    }
    __syncwarp();  // the head is there
    Element* target =
        is_query ? source : cache_target(cache, cache.key, head - args.heads.query.num_heads, row);
    turn_head(rotary, angles, values[warp], width, lane, target);
}

template <typename Weight>
void launch(const RotateAndCacheArgs& args, Stream stream) {
    const KvCacheArgs& cache = args.store.cache;
    const int64_t num_rows =
        args.heads.rotary.num_tokens * (args.heads.rotary.num_heads + cache.num_kv_heads);
    dispatch_at_least(static_cast<int>(ceil_div(cache.head_dim, int64_t{kWarpSize})),
                      std::integer_sequence<int, 2, 4, 8>{}, [&](auto per_lane) {
                          launch_dependent(
                              "rotate_and_cache", rotate_and_cache_kernel<per_lane(), Weight>,
                              dim3(static_cast<unsigned>(ceil_div(num_rows, kWarpsPerBlock))),
                              dim3(kWarpsPerBlock * kWarpSize), 0, stream, args);
                      });
}

}  // namespace

void rotate_and_cache(const RotateAndCacheArgs& args, Stream stream) {
    static_assert(kMaxHeadDim <= kMaxHeadWidth);
    if (args.heads.rotary.num_tokens == 0) return;  // a grid of 0 blocks is a launch error
    if (args.has_norm && args.heads.query.weight_dtype == DType::kFloat32)
        launch<float>(args, stream);
    else
        launch<__nv_bfloat16>(args, stream);
}

}  // namespace moecore::cuda
