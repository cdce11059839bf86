#pragma once

// Device float32 mathematics with the CPU's bits: each function performs the operations of
// cpu/kernels/math.hpp and cpu/kernels/epilogue.hpp in their order. The _rn intrinsics round once
// each and are never contracted. Not for -ftz=true or -use_fast_math: results may be subnormal.

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "moecore/grouped_gemm.hpp"
#include "moecore/kernels/score_constants.hpp"

namespace moecore::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) {
    return __uint_as_float(uint32_t{__bfloat16_as_ushort(x)} << 16);
}

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
/// Rounds to nearest, ties to even; a NaN stays a NaN with its sign and upper payload.
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    return __ushort_as_bfloat16(static_cast<uint16_t>(rounded >> 16));
}

/// One coefficient as a scalar constant: device code sees those, but no array of the host.
template <const auto& kPoly, size_t kIndex>
inline constexpr float kCoefficient = kPoly[kIndex];

/// Horner's rule, kPoly[0] being the coefficient of the highest power.
template <const auto& kPoly, size_t... kIndex>
__device__ float polynomial(float x, std::index_sequence<kIndex...>) {
    float p = kCoefficient<kPoly, 0>;
    ((p = __fmaf_rn(p, x, kCoefficient<kPoly, kIndex + 1>)), ...);
    return p;
}

__device__ inline float exp(float x) {
    using namespace score;
    const float shifted = __fmaf_rn(x, kLog2e, kRoundMagic);
    const float n = __fsub_rn(shifted, kRoundMagic);
    float r = __fmaf_rn(n, -kLn2High, x);
    r = __fmaf_rn(n, -kLn2Low, r);
    float p = polynomial<kExpPoly>(r, std::make_index_sequence<5>{});
    p = __fmaf_rn(p, __fmul_rn(r, r), __fadd_rn(r, 1.0f));
    // 2^n in two factors, so that results below the normal range round once, gradually. Unsigned,
    // because n is arbitrary bits where x is out of range.
    const uint32_t n_bits = __float_as_uint(shifted) - uint32_t{kRoundMagicBits};
    const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(n_bits) >> 1);
    const uint32_t rest = n_bits - half;
    p = __fmul_rn(p, __uint_as_float((half + 127u) << 23));
    p = __fmul_rn(p, __uint_as_float((rest + 127u) << 23));
    if (kExpOverflow < x) p = __uint_as_float(0x7f800000u);
    if (x < kExpUnderflow) p = 0.0f;
    return x != x ? x : p;
}

/// 1 / (1 + exp(-x))
__device__ inline float sigmoid(float x) {
    return __fdiv_rn(1.0f, __fadd_rn(1.0f, exp(__fsub_rn(0.0f, x))));
}

/// log(u) for finite u >= 1.
__device__ inline float log(float u) {
    using namespace score;
    const int32_t bits = __float_as_int(u);
    const int32_t e = (bits - kSqrtHalfBits) >> 23;
    const float f = __fsub_rn(__int_as_float(bits - (e << 23)), 1.0f);
    const float exponent = __int2float_rn(e);
    const float p = polynomial<kLogPoly>(f, std::make_index_sequence<8>{});
    const float square = __fmul_rn(f, f);
    float y = __fmul_rn(__fmul_rn(p, f), square);
    y = __fmaf_rn(exponent, kLn2Low, y);
    y = __fmaf_rn(-0.5f, square, y);
    return __fmaf_rn(exponent, kLn2High, __fadd_rn(f, y));
}

/// sqrt(log(1 + exp(x)))
__device__ inline float sqrt_softplus(float x) {
    using namespace score;
    const bool is_linear = kSoftplusLinear < x;
    const float y = exp(is_linear ? kSoftplusLinear : x);
    const float u = __fadd_rn(1.0f, y);
    // log(u) * y / (u - 1) undoes the rounding of 1 + y; for u = 1 the answer is y itself.
    const float rounded = __fsub_rn(u, 1.0f);
    const float log1p = __fmul_rn(log(u), __fdiv_rn(y, rounded));
    float softplus = rounded < 1e-30f ? y : log1p;
    softplus = is_linear ? x : softplus;
    return __fsqrt_rn(softplus);
}

/// g' * sigmoid(alpha * g') * (u' + up_offset), g' and u' clamped. NaN passes through both clamps.
__device__ inline float clamped_swiglu(float gate, float up, const GroupedGemmConfig& config) {
    gate = config.limit < gate ? config.limit : gate;
    up = config.limit < up ? config.limit : up;
    up = up < -config.limit ? -config.limit : up;
    const float gated = __fmul_rn(gate, sigmoid(__fmul_rn(config.alpha, gate)));
    return __fmul_rn(gated, __fadd_rn(up, config.up_offset));
}

/// 0.5 * g * (1 + tanh(z)) is g * sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3).
__device__ inline float gelu_tanh(float gate) {
    const float cube = __fmul_rn(__fmul_rn(gate, gate), gate);
    const float z = __fmaf_rn(0.044715f, cube, gate);
    return __fmul_rn(gate, sigmoid(__fmul_rn(1.5957691216057308f, z)));
}

__device__ inline float activate(float gate, float up, const GroupedGemmConfig& config) {
    switch (config.activation) {
        case Activation::kSwiglu:
            return __fmul_rn(__fmul_rn(gate, sigmoid(gate)), up);
        case Activation::kClampedSwiglu:
            return clamped_swiglu(gate, up, config);
        case Activation::kGeluTanh:
            return __fmul_rn(gelu_tanh(gate), up);
        case Activation::kNone:
            break;
    }
    return gate;
}

}  // namespace moecore::cuda
