#pragma once

// What all tensor cores' kernels do with a sum: bias and activation.

#include <cuda_bf16.h>

#include <cstdint>

#include "common/mma_sm80.cuh"
#include "moecore/kernels/grouped_gemm.hpp"

namespace moecore::cuda {

/// x * sigmoid(scale * x), for a result that rounds to a few units of float32.
__device__ inline float times_sigmoid(float x, float scale) {
    constexpr float kLog2e = 1.4426950408889634f;
    const float power = exp2_fast(x * (-kLog2e * scale));
    return x * reciprocal_fast(1.0f + power);
}

/// The activations as functors of gate and up.
template <Activation kActivation>
struct Epilogue;

template <>
struct Epilogue<Activation::kSwiglu> {
    __device__ explicit Epilogue(const GroupedGemmConfig&) {}
    __device__ float operator()(float gate, float up) const {
        return times_sigmoid(gate, 1.0f) * up;
    }
};

template <>
struct Epilogue<Activation::kClampedSwiglu> {
    __device__ explicit Epilogue(const GroupedGemmConfig& config) : config(config) {}
    /// NaN passes through both clamps.
    __device__ float operator()(float gate, float up) const {
        gate = config.limit < gate ? config.limit : gate;
        up = config.limit < up ? config.limit : up;
        up = up < -config.limit ? -config.limit : up;
        return times_sigmoid(gate, config.alpha) * (up + config.up_offset);
    }
    const GroupedGemmConfig& config;
};

template <>
struct Epilogue<Activation::kGeluTanh> {
    __device__ explicit Epilogue(const GroupedGemmConfig&) {}
    /// 0.5 * g * (1 + tanh(z)) is g * sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3).
    __device__ float operator()(float gate, float up) const {
        const float inner = fmaf(0.044715f * gate * gate, 1.5957691216057308f, 1.5957691216057308f);
        return times_sigmoid(gate, inner) * up;
    }
};

/// Where row `row` of the output begins.
template <bool kIsGated, typename T>
__device__ T* output_row(const GroupedGemmArgs& args, int64_t row) {
    if (!kIsGated && args.row_addresses != nullptr)
        return reinterpret_cast<T*>(args.row_addresses[row]);
    return static_cast<T*>(args.output) + row * args.output_stride;
}

/// The bias of output column `column`, of its gate (half 0) or up (half 1) where kIsGated; 0 where
/// there is none, or no such column.
template <bool kIsGated>
__device__ float bias_of(const GroupedGemmArgs& args, int64_t group, int64_t column, int half) {
    const int64_t num_columns = kIsGated ? args.n / 2 : args.n;
    if (args.bias == nullptr || column >= num_columns) return 0.0f;
    int64_t row = column;
    if (kIsGated)
        row = args.config.gate_order == GateOrder::kInterleaved ? 2 * column + half
                                                                : column + half * num_columns;
    const int64_t offset = group * args.bias_stride + row;
    return args.bias_dtype == DType::kBFloat16
               ? __bfloat162float(static_cast<const __nv_bfloat16*>(args.bias)[offset])
               : static_cast<const float*>(args.bias)[offset];
}

}  // namespace moecore::cuda
