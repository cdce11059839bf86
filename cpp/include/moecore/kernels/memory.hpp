#pragma once

#include <cstddef>
#include <string>

namespace moecore::cuda {

/// Memory of GPU `device`. Throws CudaError.
void* allocate(int device, size_t bytes);
void deallocate(void* data, int device) noexcept;

/// Version of the CUDA toolkit this build used, "" in a build without CUDA.
std::string toolkit_version();

}  // namespace moecore::cuda
