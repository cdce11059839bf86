#pragma once

#include <cstdint>

#include "moecore/dtype.hpp"
#include "moecore/kernels/head_strides.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// What every rms_norm kernel takes. Built and checked by ops/rms_norm.cpp. T tokens, n heads.
struct RmsNormArgs {
    const void* input;   ///< [T, n, N] of `dtype`
    const void* weight;  ///< [N] of `weight_dtype`
    void* residual;      ///< [T, n, N] of `dtype`, in and out; or nullptr
    void* output;        ///< [T, n, N] of `dtype`, out; may be `input`
    HeadStrides input_strides, residual_strides, output_strides;
    int64_t num_tokens;  ///< T >= 0
    int64_t num_heads;   ///< n >= 0
    int64_t width;       ///< N >= 1
    float eps;
    DType dtype;
    DType weight_dtype;
};

namespace cpu {
void rms_norm(const RmsNormArgs& args);
}
namespace cuda {
void rms_norm(const RmsNormArgs& args, Stream stream);
}

}  // namespace moecore
