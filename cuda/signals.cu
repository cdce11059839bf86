// A meeting of the ranks of one host, on their GPUs.
//
//   reads, writes  a word of each rank
//
// One block, a thread a rank: it tells that rank how many meetings there were, and waits until it
// hears as much. The wait ends at its limit, or when the host says so; then this rank tells nobody
// anything any more. Needs sm_70.

#include "common/launch.cuh"
#include "moecore/kernels/signals.hpp"

namespace moecore::cuda {
namespace {

__device__ void store_release(uint32_t* word, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ uint32_t load_acquire(const uint32_t* word) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ uint64_t now_ns() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

/// The host's memory is far: it is read once in a while.
__device__ bool is_over(const SignalArgs& args) {
    return *const_cast<volatile uint32_t*>(&args.state->is_over) != 0;
}

/// Whether rank `other` has come.
__device__ bool wait_for(const SignalArgs& args, int other, uint32_t round) {
    constexpr int kPolls = 256;
    const uint64_t start = now_ns();
    for (int poll = 1;; ++poll) {
        // Who is ahead has told a later round, and counts may wrap around.
        if (static_cast<int32_t>(load_acquire(args.words + other) - round) >= 0) return true;
        if (poll % kPolls != 0) continue;
        if (is_over(args)) return false;
        if (now_ns() - start < args.limit_ns) continue;
        *const_cast<volatile int32_t*>(&args.state->late) = 1 + other;
        __threadfence_system();
        *const_cast<volatile uint32_t*>(&args.state->is_over) = 1;
        return false;
    }
}

__global__ void __launch_bounds__(SignalArgs::kMaxRanks)
    meet_kernel(const __grid_constant__ SignalArgs args) {
    wait_for_predecessors();
    allow_dependents();  // their launch hides behind the wait
    __shared__ uint32_t round, has_failed;
    uint32_t* count = args.words + SignalArgs::kMaxRanks;
    uint32_t* failed = count + 1;
    if (threadIdx.x == 0) {
        round = ++*count;
        has_failed = *failed;
    }
    __syncthreads();
    // After a meeting without some rank the stream runs on, but what it writes is worth nothing: no
    // other rank may take it for done.
    const int other = static_cast<int>(threadIdx.x);
    if (has_failed != 0 || other >= args.num_ranks || other == args.rank) return;
    __threadfence_system();  // what the stream has written, before the word that tells of it
    store_release(args.theirs[other] + args.rank, round);
    if (!wait_for(args, other, round)) *failed = 1;
}

}  // namespace

void meet(const SignalArgs& args, Stream stream) {
    launch_dependent("meet", meet_kernel, dim3(1), dim3(SignalArgs::kMaxRanks), 0, stream, args);
}

}  // namespace moecore::cuda
