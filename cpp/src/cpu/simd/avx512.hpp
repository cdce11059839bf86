#pragma once

// Sixteen lanes in one zmm register. Same operations as simd/scalar.hpp, lane by lane.

#include <immintrin.h>

#include <cstdint>

namespace moecore::cpu {
namespace {

constexpr int kLanes = 16;

struct Mask {
    __mmask16 bits;
};

struct I32x16 {
    __m512i v;
    static I32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
    static I32x16 load_u16(const uint16_t* p) {
        return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static I32x16 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
    void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};

struct F32x16 {
    __m512 v;
    static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
    static F32x16 load_first(const float* p, int count) {
        return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
    }
    static F32x16 load_bf16(const uint16_t* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store_bf16(uint16_t* p) const {
#if defined(__AVX512BF16__)
        // The instruction takes subnormals for 0, and is right for everything else.
        constexpr int kSubnormal = 0x20;
        if (_mm512_fpclass_ps_mask(v, kSubnormal) == 0) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
            return;
        }
#endif
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i result = _mm512_mask_mov_epi32(rounded, nan, quiet);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
    }
};

/// store_bf16 for lanes that are normal, 0 or NaN.
inline void store_normal_bf16(F32x16 x, uint16_t* p) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
#else
    x.store_bf16(p);
#endif
}

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float reduce_add(F32x16 a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float reduce_max(F32x16 a) {
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
inline Mask less(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask is_nan(F32x16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline F32x16 select(Mask m, F32x16 a, F32x16 b) { return {_mm512_mask_mov_ps(b.v, m.bits, a.v)}; }
inline I32x16 bits_of(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline F32x16 float_of_bits(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 sub(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
template <int kBits>
I32x16 shift_left(I32x16 a) {
    return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
I32x16 shift_right_arithmetic(I32x16 a) {
    return {_mm512_srai_epi32(a.v, kBits)};
}
inline I32x16 bit_and(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32x16 bit_or(I32x16 a, I32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I32x16 bit_xor(I32x16 a, I32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <bool kSecond>
I32x16 every_other(I32x16 a, I32x16 b) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_epi32(a.v, kSecond ? odd : even, b.v)};
}
inline I32x16 min(I32x16 a, I32x16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline I32x16 first_lanes(int count, I32x16 a, I32x16 b) {
    return {_mm512_mask_mov_epi32(b.v, static_cast<__mmask16>((1u << count) - 1), a.v)};
}
inline I32x16 max_lanes(I32x16 a) {
    __m512i x = _mm512_max_epi32(a.v, _mm512_shuffle_i32x4(a.v, a.v, 0b01001110));
    x = _mm512_max_epi32(x, _mm512_shuffle_i32x4(x, x, 0b10110001));
    x = _mm512_max_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_BADC));
    return {_mm512_max_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_CDAB))};
}
inline int32_t first_lane(I32x16 a) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(a.v)); }
inline I32x16 with_lane(I32x16 a, int lane, I32x16 from) {
    return {_mm512_mask_mov_epi32(a.v, static_cast<__mmask16>(1u << lane), from.v)};
}
inline uint32_t equal_bits(I32x16 a, I32x16 b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }

}  // namespace
}  // namespace moecore::cpu
