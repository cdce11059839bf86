#pragma once

// Thread block clusters of sm_90. Before it, every block is a cluster of its own.

#include <cstdint>
#include <cstring>

namespace moecore::cuda {

/// Blocks of this block's cluster.
__device__ inline unsigned cluster_size() {
    unsigned size = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
}

/// This block's place in its cluster.
__device__ inline unsigned cluster_rank() {
    unsigned rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

/// Waits for all threads of the cluster; what they wrote to shared memory is visible after it.
__device__ inline void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

/// The 32-bit value at the same place of block `rank`'s shared memory as `local` is in this
/// block's. REQUIRES: that block has not left.
template <typename T>
__device__ T load_from_cluster(const T* local, unsigned rank) {
    static_assert(sizeof(T) == 4);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t remote = 0, value = 0;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote) : "memory");
    T result;
    memcpy(&result, &value, sizeof result);
    return result;
#else
    return *local;
#endif
}

/// The same of four floats, 16-byte aligned.
__device__ inline float4 load_from_cluster(const float4* local, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t remote = 0;
    float4 value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(remote)
                 : "memory");
    return value;
#else
    return *local;
#endif
}

}  // namespace moecore::cuda
