#pragma once

#include <cstddef>

namespace moecore::bench {

/// Memory to read for bandwidth probes: far larger than any cache, in huge pages where granted.
class BandwidthProbe {
public:
    explicit BandwidthProbe(size_t bytes = size_t{512} << 20);
    ~BandwidthProbe();
    BandwidthProbe(const BandwidthProbe&) = delete;
    BandwidthProbe& operator=(const BandwidthProbe&) = delete;

    /// GB/s of reading the next 128 MB on every thread of moecore::num_threads().
    double read_gbps();

private:
    char* data_;
    size_t bytes_;
    size_t next_ = 0;
};

/// GFLOP/s of multiply-adds on registers alone, on every thread. If `bf16` is set: AMX where the
/// core uses it, or vdpbf16ps where the processor has it. Else float32 FMA. 0 where neither AVX-512
/// nor AVX2 is there.
double matmul_gflops(bool bf16);

/// Microseconds of an empty OpenMP region on every thread: what a parallel op costs at least.
double empty_region_us();

}  // namespace moecore::bench
