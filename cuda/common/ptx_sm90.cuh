#pragma once

// Named wrappers of the sm_90a instructions that CUDA C++ has no name for: barriers in shared
// memory, the copy engine, matrix products of a warpgroup. All inline PTX is here and in
// wgmma_sm90.cuh. Shared memory is named by its 32-bit address.

#include <cuda.h>

#include <cstdint>

#include "common/wgmma_sm90.cuh"

namespace moecore::cuda::ptx {

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Barriers -----------------------------------------------------------------------------------
// A barrier counts arrivals, and bytes that copies promised; when neither is due, its phase flips.

__device__ inline void barrier_init(uint32_t barrier, uint32_t num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals));
}

/// Makes barrier_init visible to the copy engine.
__device__ inline void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives, and promises `bytes` from the copy engine in this phase.
__device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/// Arrives once every copy_16 that this thread has issued is done.
__device__ inline void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Waits for the end of the phase with this parity: 0 for the first, 1 for the second, and so on.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t is_done = 0;
    while (is_done == 0)
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(is_done)
            : "r"(barrier), "r"(parity)
            : "memory");
}

/// Where block `rank` of the cluster has what this block has at `address`.
__device__ inline uint32_t address_in(uint32_t address, unsigned rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

/// Arrives at a barrier of another block of the cluster. `barrier`: of address_in.
__device__ inline void cluster_barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// The same; who waits for it with cluster_barrier_wait sees what this thread stored before. Costs
/// about a microsecond.
__device__ inline void cluster_barrier_release(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
                 : "memory");
}

/// barrier_wait for what another block stored before its cluster_barrier_release.
__device__ inline void cluster_barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t is_done = 0;
    while (is_done == 0)
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(is_done)
            : "r"(barrier), "r"(parity)
            : "memory");
}

/// Stores to shared memory of another block. `address`: of address_in.
__device__ inline void cluster_store(uint32_t address, int value) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

/// A barrier of `num_threads` of the block, whole warps; id 0 is __syncthreads'.
__device__ inline void named_barrier(uint32_t id, uint32_t num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// --- Copies -------------------------------------------------------------------------------------

/// How long L2 should keep what a copy reads.
enum class Keep : uint64_t { kNormal = 0x1000000000000000, kBriefly = 0x12f0000000000000 };

__device__ inline void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Copies the box of `map` at `coordinate` to shared memory; `barrier` counts its bytes.
__device__ inline void copy_box(uint32_t target, const CUtensorMap& map, const int (&coordinate)[5],
                                uint32_t barrier, Keep keep) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(target),
        "l"(&map), "r"(coordinate[0]), "r"(coordinate[1]), "r"(coordinate[2]), "r"(coordinate[3]),
        "r"(coordinate[4]), "r"(barrier), "l"(static_cast<uint64_t>(keep))
        : "memory");
}

/// The same, to the same place in each block of the cluster whose bit is set in `blocks`; the
/// barrier at the same place in each counts the bytes.
__device__ inline void copy_box_to(uint16_t blocks, uint32_t target, const CUtensorMap& map,
                                   const int (&coordinate)[5], uint32_t barrier, Keep keep) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;" ::"r"(
            target),
        "l"(&map), "r"(coordinate[0]), "r"(coordinate[1]), "r"(coordinate[2]), "r"(coordinate[3]),
        "r"(coordinate[4]), "r"(barrier), "h"(blocks), "l"(static_cast<uint64_t>(keep))
        : "memory");
}

/// The same of a map of two dimensions.
__device__ inline void copy_box(uint32_t target, const CUtensorMap& map, const int (&coordinate)[2],
                                uint32_t barrier, Keep keep) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
        "l"(&map), "r"(coordinate[0]), "r"(coordinate[1]), "r"(barrier),
        "l"(static_cast<uint64_t>(keep))
        : "memory");
}

/// Copies 16 bytes to shared memory past L1, or writes zeros there and reads nothing.
__device__ inline void copy_16(uint32_t target, const void* source, bool is_zero) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(is_zero ? 0 : 16)
                 : "memory");
}

/// Orders this thread's accesses to the block's shared memory before later ones of the copy engine
/// and wgmma, whichever block of the cluster starts them. (Of shared::cluster the compiler makes a
/// membar of the whole GPU, which waits for all that was stored.)
__device__ inline void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- Matrix products of a warpgroup (4 warps) ---------------------------------------------------

/// Of a tile in shared memory whose rows are 128 bytes, in the copy engine's 128-byte swizzle: 16
/// bytes at column c of row r lie at column c ^ (r % 8). `address` is that of a row divisible by 8,
/// in 1024-byte aligned memory, plus the bytes by which K is advanced.
__device__ inline uint64_t swizzled_tile(uint32_t address) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
    constexpr uint64_t kUnused = uint64_t{1} << 16;
    return kSwizzle128 | kEightRows | kUnused | (address & 0x3ffffu) >> 4;
}

/// Before a wgmma whose registers were touched by anything else.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from using `sum` before this point: it knows of no asynchronous writes.
template <int kCount>
__device__ void wgmma_results(float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

/// Moves registers between warpgroups: all warps of one must call it.
template <int kRegisters>
__device__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Fragments ----------------------------------------------------------------------------------

/// Stores four 8 x 8 matrices of 16-bit elements, transposed: lane l holds elements (l / 4,
/// 2 (l % 4)) and the next of each; lane 8 m + i gives the address where column i of matrix m goes.
__device__ inline void store_transposed(uint32_t address, const uint32_t (&fragment)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
        : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
    uint4 data;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
                 : "r"(address)
                 : "memory");
    return data;
}

}  // namespace moecore::cuda::ptx
