// Copies at the pace of a link that is not there.
//
//   reads   `bytes` of the source, with blocks
//   writes  them to the target
//
// Any architecture. globaltimer counts nanoseconds, and moves at least every microsecond.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "common/driver.hpp"
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

/// Holds streams by the host's clock, with no kernel: a stream says in pinned memory that it is
/// there, and waits until a thread of the host says that it may go on.
class Holder {
public:
    Holder() {
        check(cudaHostAlloc(&signals_, 2 * sizeof(uint64_t), cudaHostAllocPortable),
              "cudaHostAlloc");
        signals_[kThere] = signals_[kGo] = 0;
        thread_ = std::thread([this] { work(); });
    }
    ~Holder() {
        ends_ = true;
        thread_.join();  // at the process's end: the driver frees what is pinned
    }
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;

    /// `us` microseconds from when `stream` gets there. Holds are counted as they are called, and
    /// must get there in that order.
    void hold(double us, Stream stream) {
        const uint64_t number = ++num_held_;
        require(number - num_done_ < kMost, "Holder: too many holds at a time");
        durations_us_[number % kMost] = us;
        const auto address = [&](int signal) {
            return reinterpret_cast<CUdeviceptr>(signals_ + signal);
        };
        static const auto write =
            cuda::find_in_driver<PFN_cuStreamWriteValue64_v11070>("cuStreamWriteValue64");
        static const auto wait =
            cuda::find_in_driver<PFN_cuStreamWaitValue64_v11070>("cuStreamWaitValue64");
        const CUresult wrote = write(native(stream), address(kThere), number, 0);
        const CUresult waits = wait(native(stream), address(kGo), number, CU_STREAM_WAIT_VALUE_GEQ);
        if (wrote != CUDA_SUCCESS || waits != CUDA_SUCCESS)
            throw CudaError("Holder: the driver cannot write or wait for a value");
    }

private:
    using Clock = std::chrono::steady_clock;
    enum : int { kThere, kGo };
    static constexpr uint64_t kMost = 256;

    void work() {
        const volatile uint64_t* there = signals_ + kThere;
        volatile uint64_t* go = signals_ + kGo;
        while (!ends_) {
            const uint64_t number = num_done_ + 1;
            if (*there < number) continue;
            const auto due = Clock::now() + std::chrono::duration<double, std::micro>(
                                                durations_us_[number % kMost]);
            while (Clock::now() < due) continue;
            *go = number;
            num_done_ = number;
        }
    }

    uint64_t* signals_ = nullptr;  ///< pinned
    std::array<std::atomic<double>, kMost> durations_us_{};
    uint64_t num_held_ = 0;
    std::atomic<uint64_t> num_done_ = 0;
    std::atomic<bool> ends_ = false;
    std::thread thread_;
};

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
        static Holder holder;
        holder.hold(us, stream);
    }
    check(cudaPeekAtLastError(), "paced_copy launch");
}

}  // namespace moecore::bench
