#pragma once

// A tensor as Hopper's copy engine sees it.

#include <array>
#include <cstdint>

#include "common/driver.hpp"

namespace moecore::cuda::sm90 {

/// A bfloat16 tensor as the copy engine sees it, swizzled for wgmma; zeros lie around it.
/// `promotion`: bytes that L2 fetches at a time.
template <size_t kRank>
CUtensorMap encode_map(const void* data, const std::array<cuuint64_t, kRank>& sizes,
                       const std::array<cuuint64_t, kRank - 1>& strides,
                       const std::array<cuuint32_t, kRank>& box, const char* name, int64_t n,
                       int64_t k_dim,
                       CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode =
        find_in_driver<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
    std::array<cuuint32_t, kRank> steps;
    steps.fill(1);
    CUtensorMap map{};
    const CUresult result =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), sizes.data(),
               strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw CudaError(concat("grouped_gemm: cuTensorMapEncodeTiled failed with error ",
                               static_cast<int>(result), " for ", name, " [", n, ", ", k_dim, "]"));
    return map;
}

}  // namespace moecore::cuda::sm90
