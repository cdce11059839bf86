#pragma once

#include <cstdint>

#include "moecore/threads.hpp"

namespace moecore::cpu {

/// Calls fn(begin, end) on ranges of about `grain` that cover 0 .. count - 1, on the threads of
/// moecore::num_threads(). Ranges are handed out as threads become free. fn must not throw.
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
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < num_ranges; ++i) range(i);
}

}  // namespace moecore::cpu
