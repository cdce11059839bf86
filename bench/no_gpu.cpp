// The GPU of a build without CUDA.

#include "gpu.hpp"
#include "moecore/error.hpp"

namespace moecore::bench {
namespace {

[[noreturn]] void throw_no_gpu() {
    throw UnsupportedError("--device cuda: this build of the benchmarks has no CUDA");
}

}  // namespace

Gpu::Gpu() { throw_no_gpu(); }
Gpu::~Gpu() = default;
std::string Gpu::name() const { throw_no_gpu(); }
OwnedTensor Gpu::empty(DType, std::initializer_list<int64_t>) { throw_no_gpu(); }
OwnedTensor Gpu::random(DType, std::initializer_list<int64_t>, float, uint64_t) { throw_no_gpu(); }
OwnedTensor Gpu::upload(const OwnedTensor&) { throw_no_gpu(); }
void Gpu::download(void*, const TensorView&) { throw_no_gpu(); }
Sample Gpu::measure(int, int, bool, const std::function<void(int)>&) { throw_no_gpu(); }
double Gpu::read_gbps() { throw_no_gpu(); }
double Gpu::matmul_tflops() { throw_no_gpu(); }
void paced_copy(void*, const void*, size_t, double, int, Stream) { throw_no_gpu(); }

}  // namespace moecore::bench
