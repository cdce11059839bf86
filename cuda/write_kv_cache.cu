// Keys and values into a paged cache.
//
//   reads   T * Hk * D * 4 bytes of key and value
//   writes  the same of the cache
//
// One thread moves 16 bytes. Needs sm_80.

#include <cstdint>

#include "common/kv_batch.cuh"
#include "common/launch.cuh"
#include "moecore/kernels/write_kv_cache.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kElementsPerVector = 8;

__global__ void __launch_bounds__(kThreads)
    write_kv_cache_kernel(const __grid_constant__ WriteKvCacheArgs args) {
    const KvCacheArgs& cache = args.cache;
    const int64_t vectors = cache.head_dim / kElementsPerVector;
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t vector = index % vectors;
    const int64_t head = index / vectors % cache.num_kv_heads;
    const int64_t token = index / vectors / cache.num_kv_heads;
    const bool is_value = blockIdx.y == 1;
    load_parameters(args);
    if (!cache.is_settled) wait_for_predecessors();
    const int64_t row = token < args.num_tokens ? cache_row(cache, token) : -1;
    if (cache.is_settled) wait_for_predecessors();
    allow_dependents();
    if (row < 0) return;
    const HeadStrides& strides = is_value ? args.value_strides : args.key_strides;
    const auto* source = static_cast<const uint16_t*>(is_value ? args.value : args.key) +
                         token * strides.token + head * strides.head + vector * kElementsPerVector;
    auto* target = static_cast<uint16_t*>(is_value ? cache.value : cache.key) +
                   (head * cache.num_blocks * kKvBlockSize + row) * cache.head_dim +
                   vector * kElementsPerVector;
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
}

}  // namespace

void write_kv_cache(const WriteKvCacheArgs& args, Stream stream) {
    const KvCacheArgs& cache = args.cache;
    const int64_t vectors =
        args.num_tokens * cache.num_kv_heads * (cache.head_dim / kElementsPerVector);
    if (vectors == 0) return;  // a grid of 0 blocks is a launch error
    const dim3 grid(static_cast<unsigned>(ceil_div(vectors, int64_t{kThreads})), 2);
    launch_dependent("write_kv_cache", write_kv_cache_kernel, grid, dim3(kThreads), 0, stream,
                     args);
}

}  // namespace moecore::cuda
