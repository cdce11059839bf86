#pragma once

// exp, sigmoid and friends on sixteen lanes. Included after one simd/*.hpp, in its anonymous
// namespace. Each is one fixed sequence of float32 operations: see kernels/score_constants.hpp.

#include "moecore/kernels/score_constants.hpp"

namespace moecore::cpu {
namespace {

inline F32x16 exp(F32x16 x) {
    using namespace score;
    const auto c = [](float value) { return F32x16::broadcast(value); };
    // select with the constant first on a false comparison keeps a NaN.
    const Mask overflows = less(c(kExpOverflow), x);
    const Mask underflows = less(x, c(kExpUnderflow));
    const F32x16 shifted = fma(x, c(kLog2e), c(kRoundMagic));
    const F32x16 n = sub(shifted, c(kRoundMagic));
    F32x16 r = fma(n, c(-kLn2High), x);
    r = fma(n, c(-kLn2Low), r);
    F32x16 p = c(kExpPoly[0]);
    for (int i = 1; i < 6; ++i) p = fma(p, r, c(kExpPoly[i]));
    p = fma(p, mul(r, r), add(r, c(1.0f)));
    // 2^n in two factors, so that results below the normal range round once, gradually.
    const I32x16 n_bits = sub(bits_of(shifted), I32x16::broadcast(kRoundMagicBits));
    const I32x16 half = shift_right_arithmetic<1>(n_bits);
    const I32x16 rest = sub(n_bits, half);
    const I32x16 bias = I32x16::broadcast(127);
    p = mul(p, float_of_bits(shift_left<23>(add(half, bias))));
    p = mul(p, float_of_bits(shift_left<23>(add(rest, bias))));
    p = select(overflows, c(__builtin_huge_valf()), p);
    p = select(underflows, c(0.0f), p);
    return select(is_nan(x), x, p);
}

/// 2^x, but 0 where that is subnormal. Exactly 1 at 0; error < 1 ulp. REQUIRES: x is NaN or < 127.
inline F32x16 exp2_to_normal(F32x16 x) {
    using namespace score;
    const auto c = [](float value) { return F32x16::broadcast(value); };
    const Mask underflows = less(x, c(-126.0f));
    const F32x16 shifted = add(x, c(kRoundMagic));
    const F32x16 f = sub(x, sub(shifted, c(kRoundMagic)));
    F32x16 p = c(kExp2Poly[0]);
    for (int i = 1; i < 6; ++i) p = fma(p, f, c(kExp2Poly[i]));
    p = fma(p, f, c(1.0f));
    // The magic number's own bits leave by the shift.
    static_assert(static_cast<uint32_t>(kRoundMagicBits) << 23 == 0);
    const I32x16 scale = add(shift_left<23>(bits_of(shifted)), I32x16::broadcast(127 << 23));
    return select(underflows, c(0.0f), mul(p, float_of_bits(scale)));
}

/// 1 / (1 + exp(-x))
inline F32x16 sigmoid(F32x16 x) {
    const F32x16 one = F32x16::broadcast(1.0f);
    return div(one, add(one, exp(sub(F32x16::broadcast(0.0f), x))));
}

/// log(u) for finite u >= 1.
inline F32x16 log(F32x16 u) {
    using namespace score;
    const auto c = [](float value) { return F32x16::broadcast(value); };
    const I32x16 bits = bits_of(u);
    const I32x16 e = shift_right_arithmetic<23>(sub(bits, I32x16::broadcast(kSqrtHalfBits)));
    const F32x16 f = sub(float_of_bits(sub(bits, shift_left<23>(e))), c(1.0f));
    const F32x16 exponent = to_float(e);
    F32x16 p = c(kLogPoly[0]);
    for (int i = 1; i < 9; ++i) p = fma(p, f, c(kLogPoly[i]));
    const F32x16 square = mul(f, f);
    F32x16 y = mul(mul(p, f), square);
    y = fma(exponent, c(kLn2Low), y);
    y = fma(c(-0.5f), square, y);
    return fma(exponent, c(kLn2High), add(f, y));
}

/// sqrt(log(1 + exp(x)))
inline F32x16 sqrt_softplus(F32x16 x) {
    using namespace score;
    const F32x16 one = F32x16::broadcast(1.0f);
    const F32x16 linear = F32x16::broadcast(kSoftplusLinear);
    const Mask is_linear = less(linear, x);
    const F32x16 y = exp(select(is_linear, linear, x));
    const F32x16 u = add(one, y);
    // log(u) * y / (u - 1) undoes the rounding of 1 + y; for u = 1 the answer is y itself.
    const F32x16 rounded = sub(u, one);
    const F32x16 log1p = mul(log(u), div(y, rounded));
    const Mask tiny = less(rounded, F32x16::broadcast(1e-30f));
    F32x16 softplus = select(tiny, y, log1p);
    softplus = select(is_linear, x, softplus);
    return sqrt(softplus);
}

}  // namespace
}  // namespace moecore::cpu
