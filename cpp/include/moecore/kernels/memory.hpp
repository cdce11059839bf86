#pragma once

#include <cstddef>
#include <string>

namespace moecore::cuda {

/// Memory of GPU `device`. Throws CudaError.
void* allocate(int device, size_t bytes);
/// The same, of zeros; waits for the device.
void* allocate_zeros(int device, size_t bytes);
void deallocate(void* data, int device) noexcept;

/// Makes `device` current, and the previous device again at the end of the scope: launches go to
/// the current device. Does nothing in a build without CUDA. Throws CudaError.
class DeviceScope {
public:
    explicit DeviceScope(int device);
    ~DeviceScope();
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

private:
    int previous_ = 0;
};

/// Version of the CUDA toolkit this build used, "" in a build without CUDA.
std::string toolkit_version();

}  // namespace moecore::cuda
