#pragma once

// Rounding to bfloat16 that stays in float32 lanes. Included after simd/*.hpp.

namespace moecore::cpu {
namespace {

/// x rounded to bfloat16 (to nearest, ties to even), or as it is.
template <bool kBFloat16>
F32x16 rounded(F32x16 x) {
    if constexpr (!kBFloat16) return x;
    const I32x16 bits = bits_of(x);
    const I32x16 odd = bit_and(shift_right_arithmetic<16>(bits), I32x16::broadcast(1));
    const I32x16 sum = add(bits, add(odd, I32x16::broadcast(0x7fff)));
    const I32x16 upper = bit_and(sum, I32x16::broadcast(-0x10000));
    return select(is_nan(x), x, float_of_bits(upper));  // the sum could carry a NaN to infinity
}

}  // namespace
}  // namespace moecore::cpu
