// The roofs as plain C functions, for the Python benchmarks (bench/roofs.py).

#include "moecore/threads.hpp"
#include "roofs.hpp"

extern "C" {

[[gnu::visibility("default")]] double moecore_read_gbps() {
    static moecore::bench::BandwidthProbe probe;
    return probe.read_gbps();
}

[[gnu::visibility("default")]] double moecore_matmul_gflops() {
    return moecore::bench::matmul_gflops(true);
}

[[gnu::visibility("default")]] void moecore_set_threads(int threads) {
    moecore::set_num_threads(threads);
}
}
