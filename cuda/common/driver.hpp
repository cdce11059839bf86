#pragma once

// Functions of the driver, found through the runtime: nothing links to it.

#include <cudaTypedefs.h>

#include "common/launch.cuh"

namespace moecore::cuda {

/// The driver's function `name` as of CUDA 12.0. Throws CudaError where there is none.
template <typename Function>
Function find_in_driver(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || function == nullptr)
        throw CudaError(concat("the driver has no ", name));
    return reinterpret_cast<Function>(function);
}

}  // namespace moecore::cuda
