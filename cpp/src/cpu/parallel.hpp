#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "moecore/threads.hpp"

namespace moecore::cpu {

/// Calls fn(begin, end) on ranges of about `grain` that cover 0 .. count - 1, on the threads of
/// moecore::num_threads(). Each thread takes the ranges of its own share in order, so that what it
/// reads runs on from one to the next; when they are done it takes over ranges of the others, so
/// that threads of different speed end together. fn must not throw.
template <typename Fn>
void parallel_ranges(int64_t count, int64_t grain, Fn&& fn) {
    const int64_t num_ranges = (count + grain - 1) / grain;
    const int threads = num_threads();
    const auto range = [&](int64_t i) {
        const int64_t begin = i * grain;
        fn(begin, begin + grain < count ? begin + grain : count);
    };
    if (num_ranges <= 1 || threads == 1) {
        for (int64_t i = 0; i < num_ranges; ++i) range(i);
        return;
    }
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    constexpr int kMaxShares = 128;
    const int num_shares = std::min(threads, kMaxShares);
    Share shares[kMaxShares];
    for (int s = 0; s < num_shares; ++s) {
        shares[s].next.store(num_ranges * s / num_shares, std::memory_order_relaxed);
        shares[s].end = num_ranges * (s + 1) / num_shares;
    }
#pragma omp parallel num_threads(threads)
    {
        const int own = omp_get_thread_num();
        for (int s = 0; s < num_shares; ++s) {
            Share& share = shares[(own + s) % num_shares];
            for (;;) {
                const int64_t i = share.next.fetch_add(1, std::memory_order_relaxed);
                if (i >= share.end) break;
                range(i);
            }
        }
    }
}

}  // namespace moecore::cpu
