// Graph replays, random data and roofs of one GPU.
//
//   reads   2 GiB for the bandwidth, three matrices of 128 MiB for the product
//   writes  what it allocates
//
// Any architecture.

#include "gpu.hpp"

#include <cuda_bf16.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "common/launch.cuh"

namespace moecore::bench {
namespace {

using cuda::check;
using cuda::native;

constexpr int kThreads = 256;
constexpr int kBlocks = 132 * 8;

/// Sums of four bytes of a hash of seed and place: close enough to normal.
__device__ float random_value(uint64_t seed, uint64_t place, float scale) {
    uint64_t x = (seed * 0x9e3779b97f4a7c15ull) ^ (place * 0xbf58476d1ce4e5b9ull + 0x1234567);
    x ^= x >> 31;
    x *= 0x94d049bb133111ebull;
    x ^= x >> 29;
    int sum = -510;
    for (int i = 0; i < 4; ++i) sum += static_cast<int>(x >> (8 * i + 16) & 0xff);
    return static_cast<float>(sum) * (scale / 147.8f);
}

__global__ void fill_kernel(void* data, bool is_bf16, int64_t count, float scale, uint64_t seed) {
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
         i += int64_t{kBlocks} * kThreads) {
        const float value = random_value(seed, static_cast<uint64_t>(i), scale);
        if (is_bf16)
            static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
        else
            static_cast<float*>(data)[i] = value;
    }
}

/// Reads all of it; writes only what never is.
__global__ void read_kernel(const uint4* data, int64_t count, uint32_t* never) {
    uint32_t sum = 0;
    const int64_t step = int64_t{kBlocks} * kThreads;
    int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = data[i + j * step];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum ^= words[j].x ^ words[j].y ^ words[j].z ^ words[j].w;
    }
    for (; i < count; i += step) sum ^= data[i].x;
    if (sum == 0x9e3779b9u) *never = sum;
}

/// What is used of cuBLAS, by its stable C interface.
struct Cublas {
    using Handle = void*;
    int (*create)(Handle*);
    int (*destroy)(Handle);
    int (*set_stream)(Handle, cudaStream_t);
    int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*,
                int, int, const void*, void*, int, int, int, int);
};

bool find_cublas(Cublas& blas) {
    void* library = nullptr;
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"})
        if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return false;
    const auto find = [&](auto& function, const char* name) {
        function =
            reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        return function != nullptr;
    };
    return find(blas.create, "cublasCreate_v2") && find(blas.destroy, "cublasDestroy_v2") &&
           find(blas.set_stream, "cublasSetStream_v2") && find(blas.gemm, "cublasGemmEx");
}

}  // namespace

Gpu::Gpu() {
    check(cudaSetDevice(0), "cudaSetDevice");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    stream_.handle = stream;
}

Gpu::~Gpu() { cudaStreamDestroy(native(stream_)); }

std::string Gpu::name() const {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    return properties.name;
}

OwnedTensor Gpu::empty(DType dtype, std::initializer_list<int64_t> shape) {
    size_t bytes = size_of(dtype);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    OwnedTensor tensor{Buffer(device(), bytes), {}};
    tensor.view = TensorView(tensor.buffer.data(), dtype, shape, device());
    return tensor;
}

OwnedTensor Gpu::random(DType dtype, std::initializer_list<int64_t> shape, float scale,
                        uint64_t seed) {
    OwnedTensor tensor = empty(dtype, shape);
    fill_kernel<<<kBlocks, kThreads, 0, native(stream_)>>>(
        tensor.view.data, dtype == DType::kBFloat16, tensor.view.num_elements(), scale, seed);
    check(cudaPeekAtLastError(), "fill launch");
    check(cudaStreamSynchronize(native(stream_)), "fill");
    return tensor;
}

OwnedTensor Gpu::upload(const OwnedTensor& tensor) {
    OwnedTensor copy{Buffer(device(), tensor.buffer.size_bytes()), tensor.view};
    copy.view.data = copy.buffer.data();
    copy.view.device = device();
    check(cudaMemcpy(copy.view.data, tensor.view.data, tensor.buffer.size_bytes(),
                     cudaMemcpyHostToDevice),
          "cudaMemcpy");
    return copy;
}

void Gpu::download(void* target, const TensorView& source) {
    const size_t bytes = static_cast<size_t>(source.num_elements()) * size_of(source.dtype);
    check(cudaStreamSynchronize(native(stream_)), "cudaStreamSynchronize");
    check(cudaMemcpy(target, source.data, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

Sample Gpu::measure(int count, int repeats, bool idle, const std::function<void(int)>& fn) {
    const cudaStream_t stream = native(stream_);
    for (int i = 0; i < count; ++i) fn(i);  // first uses load kernels
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < count; ++i) fn(i);
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
    cudaEvent_t begin = nullptr, end = nullptr;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<double> times;
    for (int i = 0; i <= repeats; ++i) {
        if (idle) std::this_thread::sleep_for(std::chrono::milliseconds(30));
        check(cudaEventRecord(begin, stream), "cudaEventRecord");
        check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
        check(cudaEventRecord(end, stream), "cudaEventRecord");
        check(cudaEventSynchronize(end), "replay");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
        if (i > 0) times.push_back(ms * 1e3 / count);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
    Sample sample;
    sample.time_us = median(times);
    std::sort(times.begin(), times.end());
    sample.spread = (times[times.size() * 3 / 4] - times[times.size() / 4]) / sample.time_us;
    return sample;
}

double Gpu::read_gbps() {
    const OwnedTensor data = random(DType::kFloat32, {int64_t{1} << 29}, 1.0f, 1);
    const OwnedTensor never = empty(DType::kInt32, {1});
    const auto count = static_cast<int64_t>(data.buffer.size_bytes() / sizeof(uint4));
    const Sample sample = measure(6, 9, false, [&](int) {
        read_kernel<<<kBlocks, kThreads, 0, native(stream_)>>>(
            static_cast<const uint4*>(data.view.data), count,
            reinterpret_cast<uint32_t*>(never.view.data));
    });
    return static_cast<double>(data.buffer.size_bytes()) / sample.time_us / 1e3;
}

double Gpu::matmul_tflops() {
    constexpr int kSize = 8192, kBf16 = 14, kCompute32F = 68, kDefault = -1;
    Cublas blas{};
    Cublas::Handle handle = nullptr;
    if (!find_cublas(blas) || blas.create(&handle) != 0) return 0;
    blas.set_stream(handle, native(stream_));
    const OwnedTensor a = random(DType::kBFloat16, {kSize, kSize}, 1.0f, 2);
    const OwnedTensor b = random(DType::kBFloat16, {kSize, kSize}, 1.0f, 3);
    const OwnedTensor c = empty(DType::kBFloat16, {kSize, kSize});
    const float one = 1.0f, zero = 0.0f;
    int status = 0;
    const Sample sample = measure(3, 7, true, [&](int) {
        status |= blas.gemm(handle, 1, 0, kSize, kSize, kSize, &one, a.view.data, kBf16, kSize,
                            b.view.data, kBf16, kSize, &zero, c.view.data, kBf16, kSize,
                            kCompute32F, kDefault);
    });
    blas.destroy(handle);
    return status == 0 ? 2.0 * kSize * kSize * kSize / sample.time_us / 1e6 : 0;
}

}  // namespace moecore::bench
