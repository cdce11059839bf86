#pragma once

// Sixteen lanes in two ymm registers. Same operations as simd/scalar.hpp, lane by lane.

#include <immintrin.h>

#include <cstdint>

namespace moecore::cpu {
namespace {

constexpr int kLanes = 16;

struct Mask {
    __m256 lo, hi;
};

struct I32x16 {
    __m256i lo, hi;
    static I32x16 load(const int32_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
    }
    static I32x16 load_u16(const uint16_t* p) {
        const auto widen = [](const uint16_t* q) {
            return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
        };
        return {widen(p), widen(p + 8)};
    }
    static I32x16 broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    void store(int32_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), hi);
    }
};

/// Rounds 8 floats to bfloat16 in the low half of each 32-bit lane.
inline __m256i round_to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

/// In each lane its index.
inline I32x16 lane_indices() {
    return {_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0),
            _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)};
}

struct F32x16 {
    __m256 lo, hi;
    static F32x16 load_first(const float* p, int count) {
        const __m256i end = _mm256_set1_epi32(count);
        const I32x16 lane = lane_indices();
        return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(end, lane.lo)),
                _mm256_maskload_ps(p + 8, _mm256_cmpgt_epi32(end, lane.hi))};
    }
    static F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static F32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F32x16 load_bf16(const uint16_t* p) {
        const auto widen = [](const uint16_t* q) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        };
        return {widen(p), widen(p + 8)};
    }
    void store(float* p) const {
        _mm256_storeu_ps(p, lo);
        _mm256_storeu_ps(p + 8, hi);
    }
    void store_bf16(uint16_t* p) const {
        // packus interleaves the 128-bit halves of its operands; the permute puts them in order.
        const __m256i packed = _mm256_packus_epi32(round_to_bf16(lo), round_to_bf16(hi));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm256_permute4x64_epi64(packed, 0b11011000));
    }
};

/// store_bf16 for lanes that are normal, 0 or NaN.
inline void store_normal_bf16(F32x16 x, uint16_t* p) { x.store_bf16(p); }

inline F32x16 add(F32x16 a, F32x16 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32x16 sub(F32x16 a, F32x16 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32x16 mul(F32x16 a, F32x16 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32x16 div(F32x16 a, F32x16 b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 max(F32x16 a, F32x16 b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline float reduce_add(F32x16 a) {
    const __m256 half = _mm256_add_ps(a.lo, a.hi);
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float reduce_max(F32x16 a) {
    const __m256 half = _mm256_max_ps(a.lo, a.hi);
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
inline Mask less(F32x16 a, F32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Mask is_nan(F32x16 a) {
    return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline F32x16 select(Mask m, F32x16 a, F32x16 b) {
    return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline I32x16 bits_of(F32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline F32x16 float_of_bits(I32x16 a) {
    return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I32x16 add(I32x16 a, I32x16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I32x16 sub(I32x16 a, I32x16 b) {
    return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
template <int kBits>
I32x16 shift_left(I32x16 a) {
    return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
I32x16 shift_right_arithmetic(I32x16 a) {
    return {_mm256_srai_epi32(a.lo, kBits), _mm256_srai_epi32(a.hi, kBits)};
}
inline I32x16 bit_and(I32x16 a, I32x16 b) {
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline I32x16 bit_or(I32x16 a, I32x16 b) {
    return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
inline I32x16 bit_xor(I32x16 a, I32x16 b) {
    return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline I32x16 max(I32x16 a, I32x16 b) {
    return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
template <bool kSecond>
I32x16 every_other(I32x16 a, I32x16 b) {
    const auto pick = [](I32x16 x) {
        // Takes from both 128-bit halves of its operands; the permute puts them in order.
        const __m256 picked = _mm256_shuffle_ps(_mm256_castsi256_ps(x.lo),
                                                _mm256_castsi256_ps(x.hi), kSecond ? 0xdd : 0x88);
        return _mm256_permute4x64_epi64(_mm256_castps_si256(picked), 0b11011000);
    };
    return {pick(a), pick(b)};
}
inline I32x16 min(I32x16 a, I32x16 b) {
    return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)};
}
inline I32x16 first_lanes(int count, I32x16 a, I32x16 b) {
    const __m256i end = _mm256_set1_epi32(count);
    const I32x16 lane = lane_indices();
    return {_mm256_blendv_epi8(b.lo, a.lo, _mm256_cmpgt_epi32(end, lane.lo)),
            _mm256_blendv_epi8(b.hi, a.hi, _mm256_cmpgt_epi32(end, lane.hi))};
}
inline I32x16 max_lanes(I32x16 a) {
    __m256i x = _mm256_max_epi32(a.lo, a.hi);
    x = _mm256_max_epi32(x, _mm256_permute2x128_si256(x, x, 0x01));
    x = _mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0b01001110));
    x = _mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0b10110001));
    return {x, x};
}
inline int32_t first_lane(I32x16 a) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(a.lo)); }
inline I32x16 with_lane(I32x16 a, int lane, I32x16 from) {
    const __m256i wanted = _mm256_set1_epi32(lane);
    const I32x16 index = lane_indices();
    return {_mm256_blendv_epi8(a.lo, from.lo, _mm256_cmpeq_epi32(index.lo, wanted)),
            _mm256_blendv_epi8(a.hi, from.hi, _mm256_cmpeq_epi32(index.hi, wanted))};
}
inline uint32_t equal_bits(I32x16 a, I32x16 b) {
    const auto bits = [](__m256i x, __m256i y) {
        return static_cast<uint32_t>(
            _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, y))));
    };
    return bits(a.lo, b.lo) | bits(a.hi, b.hi) << 8;
}

}  // namespace
}  // namespace moecore::cpu
