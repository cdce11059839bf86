#include "moecore/threads.hpp"

#include <omp.h>

#include <atomic>

#include "moecore/error.hpp"

namespace moecore {
namespace {
std::atomic<int> chosen_threads{0};
}

void set_num_threads(int num_threads) {
    require(num_threads >= 0, "set_num_threads: num_threads must be >= 0, got ", num_threads);
    chosen_threads.store(num_threads, std::memory_order_relaxed);
}

int num_threads() {
    const int chosen = chosen_threads.load(std::memory_order_relaxed);
    return chosen > 0 ? chosen : omp_get_max_threads();
}

}  // namespace moecore
