// Memory of one GPU, and the toolkit's version.
//
//   reads   nothing
//   writes  nothing, or zeros where asked: allocated memory is uninitialised
//
// No kernels, any architecture. cudaMalloc and cudaFree may wait for the device: not for hot paths.

#include "moecore/kernels/memory.hpp"

#include "common/launch.cuh"

namespace moecore::cuda {

DeviceScope::DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceScope::~DeviceScope() { cudaSetDevice(previous_); }

void* allocate(int device, size_t bytes) {
    const DeviceScope scope(device);
    void* data = nullptr;
    check(cudaMalloc(&data, bytes),
          concat("cudaMalloc of ", bytes, " bytes on cuda:", device).c_str());
    return data;
}

void* allocate_zeros(int device, size_t bytes) {
    const DeviceScope scope(device);
    void* data = allocate(device, bytes);
    check(cudaMemset(data, 0, bytes), "cudaMemset");
    // Streams that do not wait for the default one may use it at once.
    check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
    return data;
}

void deallocate(void* data, int device) noexcept {
    if (data == nullptr) return;
    // At process exit the driver may be gone before the last buffer, and its memory with it: a
    // failure here has no one to tell and nothing to undo.
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return;
    cudaFree(data);
    cudaSetDevice(previous);
}

std::string toolkit_version() {
    return concat(CUDART_VERSION / 1000, '.', CUDART_VERSION % 1000 / 10);
}

}  // namespace moecore::cuda
