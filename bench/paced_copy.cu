// Copies at the pace of a link that is not there.
//
//   reads   `bytes` of the source, with blocks
//   writes  them to the target
//
// Any architecture. globaltimer counts nanoseconds, and moves at least every microsecond.

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>

#include "common/launch.cuh"
#include "gpu.hpp"

namespace moecore::bench {
namespace {

using cuda::check;
using cuda::native;

constexpr int kThreads = 512;
constexpr int kWords = 4;  ///< of 16 bytes, in flight in a thread

__device__ uint64_t nanoseconds() {
    uint64_t now = 0;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

__device__ void wait_until(uint64_t due) {
    while (nanoseconds() < due) __nanosleep(200);
}

/// Every block copies a share side by side, and is never further than the time that has passed.
__global__ void __launch_bounds__(kThreads)
    paced_copy_kernel(uint4* target, const uint4* source, int64_t count, uint64_t duration) {
    const uint64_t start = nanoseconds();
    const int64_t begin = count * blockIdx.x / gridDim.x;
    const int64_t end = count * (blockIdx.x + 1) / gridDim.x;
    const int64_t share = max(end - begin, int64_t{1});
    for (int64_t at = begin; at < end; at += kThreads * kWords) {
        uint4 words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const int64_t word = at + i * kThreads + threadIdx.x;
            if (word < end) words[i] = source[word];
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const int64_t word = at + i * kThreads + threadIdx.x;
            if (word < end) target[word] = words[i];
        }
        if (threadIdx.x == 0)
            wait_until(start + duration * static_cast<uint64_t>(at - begin) / share);
        __syncthreads();
    }
    if (threadIdx.x == 0) wait_until(start + duration);
}

/// Of a stream: holds it for `argument` nanoseconds, by the host's clock.
void CUDART_CB hold(void* argument) {
    using Clock = std::chrono::steady_clock;
    const auto due = Clock::now() + std::chrono::nanoseconds(std::bit_cast<intptr_t>(argument));
    while (Clock::now() < due) continue;
}

}  // namespace

void paced_copy(void* target, const void* source, size_t bytes, double us, int blocks,
                Stream stream) {
    constexpr size_t kWordBytes = sizeof(uint4);
    const auto duration = static_cast<uint64_t>(us * 1e3);
    if (blocks > 0) {
        require(bytes % kWordBytes == 0, "paced_copy: bytes must be a multiple of 16, got ", bytes);
        paced_copy_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, native(stream)>>>(
            static_cast<uint4*>(target), static_cast<const uint4*>(source),
            static_cast<int64_t>(bytes / kWordBytes), duration);
    } else {
        check(cudaLaunchHostFunc(native(stream), hold,
                                 std::bit_cast<void*>(static_cast<intptr_t>(duration))),
              "cudaLaunchHostFunc");
    }
    check(cudaPeekAtLastError(), "paced_copy launch");
}

}  // namespace moecore::bench
