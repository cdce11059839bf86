#pragma once

// One GPU as the benchmarks see it. A build without CUDA links a twin that throws UnsupportedError.

#include <functional>
#include <string>

#include "harness.hpp"
#include "moecore/stream.hpp"

namespace moecore::bench {

/// GPU 0 with a stream of its own.
class Gpu {
public:
    Gpu();
    ~Gpu();
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    std::string name() const;
    Stream stream() const { return stream_; }
    static constexpr Device device() { return {DeviceType::kCuda, 0}; }

    /// Uninitialised; close to N(0, scale); a copy of one on the CPU, and back.
    OwnedTensor empty(DType dtype, std::initializer_list<int64_t> shape);
    OwnedTensor random(DType dtype, std::initializer_list<int64_t> shape, float scale,
                       uint64_t seed);
    OwnedTensor upload(const OwnedTensor& tensor);
    void download(void* target, const TensorView& source);

    /// Captures fn(0) .. fn(count - 1) in one CUDA graph and replays it `repeats` times: time and
    /// spread of one of the count. With `idle` the GPU rests 30 ms before each replay, so that its
    /// power limit slows none.
    Sample measure(int count, int repeats, bool idle, const std::function<void(int)>& fn);

    /// GB/s of reading 2 GiB: the best of a few.
    double read_gbps();

    /// TFLOP/s of a bfloat16 product of 8192 x 8192 matrices by cuBLAS, which is looked for at run
    /// time; 0 where it is not.
    double matmul_tflops();

private:
    Stream stream_;
};

/// A link as it is emulated: a transfer takes `us` plus its bytes over `gbps`.
struct Link {
    double gbps = 0, us = 0;
    int blocks = 0;  ///< that move the rows, as NCCL's do, with a multiprocessor each; none:
                     ///< copy engines do, which take nothing from kernels
};

/// Keeps `stream` busy for `us` microseconds. `blocks` blocks copy meanwhile, spread over that
/// time. Without, only the host waits, a few us more, and REQUIRES what is to arrive to be in
/// place: neither a copy within one GPU nor a kernel that waits would leave the multiprocessors
/// alone.
void paced_copy(void* target, const void* source, size_t bytes, double us, int blocks,
                Stream stream);

}  // namespace moecore::bench
