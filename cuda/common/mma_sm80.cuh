#pragma once

// Tensor cores and asynchronous copies of sm_80, as functions.

#include <cuda_bf16.h>

#include <cstdint>

namespace moecore::cuda {

__device__ inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/// Starts to copy 16 bytes into shared memory, zeros if not `exists` (then `source` is not read).
__device__ inline void copy_async(uint32_t shared, const void* source, bool exists) {
    const int bytes = exists ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source),
                 "r"(bytes)
                 : "memory");
}

/// The same where `wanted`, without a branch.
__device__ inline void copy_async_if(bool wanted, uint32_t shared, const void* source,
                                     bool exists) {
    const int bytes = exists ? 16 : 0;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %3, 0;\n"
        "@p cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
        "}" ::"r"(shared),
        "l"(source), "r"(bytes), "r"(static_cast<int>(wanted))
        : "memory");
}

/// Ends a group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until all but the kPending newest groups of this thread have arrived.
template <int kPending>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane l names the row l % 8 of matrix l / 8, 16 bytes.
__device__ inline void load_matrices(uint32_t (&matrix)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared)
                 : "memory");
}

/// The same, each transposed.
__device__ inline void load_matrices_transposed(uint32_t (&matrix)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared)
                 : "memory");
}

/// sum [16, 8] += a [16, 16] @ b [16, 8] in bfloat16, float32 sums. Lane l holds of sum the rows
/// l / 4 (elements 0, 1) and l / 4 + 8 (2, 3), columns l % 4 * 2 and one more.
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Of an 8 x 8 matrix of 16-bit elements: lane l holds elements (l / 4, l % 4 * 2) and the next,
/// and gets elements (l % 4 * 2, l / 4) and the one below.
__device__ inline uint32_t transpose(uint32_t elements) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                 : "=r"(transposed)
                 : "r"(elements));
    return transposed;
}

/// Two floats as bfloat16, the first in the low half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

/// 2^x and 1 / x to about 2 units in the last place. Subnormal results and arguments count as 0.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace moecore::cuda
