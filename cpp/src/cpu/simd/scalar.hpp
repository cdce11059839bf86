#pragma once

// Sixteen float or int lanes in plain C++: the reference that the vector headers must match lane by
// lane. Each simd/*.hpp is included by one translation unit of cpu/variants/ and lives in an
// anonymous namespace, so that code compiled for one instruction set never serves another.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace moecore::cpu {
namespace {

constexpr int kLanes = 16;

struct Mask {
    uint32_t bits;
};

struct I32x16 {
    int32_t lane[kLanes];
    static I32x16 load(const int32_t* p) {
        I32x16 r;
        std::memcpy(r.lane, p, sizeof r.lane);
        return r;
    }
    static I32x16 load_u16(const uint16_t* p) {
        I32x16 r;
        for (int i = 0; i < kLanes; ++i) r.lane[i] = p[i];
        return r;
    }
    static I32x16 broadcast(int32_t x) {
        I32x16 r;
        for (int i = 0; i < kLanes; ++i) r.lane[i] = x;
        return r;
    }
    void store(int32_t* p) const { std::memcpy(p, lane, sizeof lane); }
};

struct F32x16 {
    float lane[kLanes];
    static F32x16 load(const float* p) {
        F32x16 r;
        std::memcpy(r.lane, p, sizeof r.lane);
        return r;
    }
    static F32x16 broadcast(float x) {
        F32x16 r;
        for (int i = 0; i < kLanes; ++i) r.lane[i] = x;
        return r;
    }
    /// The first `count` lanes; the others are 0 and their memory is not read.
    static F32x16 load_first(const float* p, int count) {
        F32x16 r{};
        for (int i = 0; i < count; ++i) r.lane[i] = p[i];
        return r;
    }
    static F32x16 load_bf16(const uint16_t* p) {
        F32x16 r;
        for (int i = 0; i < kLanes; ++i) r.lane[i] = std::bit_cast<float>(uint32_t{p[i]} << 16);
        return r;
    }
    void store(float* p) const { std::memcpy(p, lane, sizeof lane); }
    void store_bf16(uint16_t* p) const {
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t bits = std::bit_cast<uint32_t>(lane[i]);
            p[i] = lane[i] != lane[i]
                       ? static_cast<uint16_t>(bits >> 16 | 0x40)
                       : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
        }
    }
};

/// store_bf16 for lanes that are normal, 0 or NaN.
inline void store_normal_bf16(F32x16 x, uint16_t* p) { x.store_bf16(p); }

template <typename V, typename Fn>
V map_lanes(Fn&& fn) {
    V r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = fn(i);
    return r;
}

template <typename Fn>
Mask mask_lanes(Fn&& fn) {
    Mask r{0};
    for (int i = 0; i < kLanes; ++i) r.bits |= static_cast<uint32_t>(fn(i)) << i;
    return r;
}

inline F32x16 add(F32x16 a, F32x16 b) {
    return map_lanes<F32x16>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
    return map_lanes<F32x16>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
    return map_lanes<F32x16>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
    return map_lanes<F32x16>([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F32x16 sqrt(F32x16 a) {
    return map_lanes<F32x16>([&](int i) { return std::sqrt(a.lane[i]); });
}
/// a * b + c, rounded once.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return map_lanes<F32x16>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
/// a where a > b, else b: b where either is NaN.
inline F32x16 max(F32x16 a, F32x16 b) {
    return map_lanes<F32x16>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
/// The lanes' sum in one tree: each lane with that of 8, then 4, 2, 1 further on.
inline float reduce_add(F32x16 a) {
    for (int step = kLanes / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) a.lane[i] += a.lane[i + step];
    return a.lane[0];
}
/// REQUIRES: no lane is NaN. Which zero comes out of zeros of both signs is not specified.
inline float reduce_max(F32x16 a) {
    float best = a.lane[0];
    for (int i = 1; i < kLanes; ++i) best = a.lane[i] > best ? a.lane[i] : best;
    return best;
}
inline Mask less(F32x16 a, F32x16 b) {
    return mask_lanes([&](int i) { return a.lane[i] < b.lane[i]; });
}
inline Mask is_nan(F32x16 a) {
    return mask_lanes([&](int i) { return a.lane[i] != a.lane[i]; });
}
/// mask ? a : b
inline F32x16 select(Mask m, F32x16 a, F32x16 b) {
    return map_lanes<F32x16>([&](int i) { return m.bits >> i & 1 ? a.lane[i] : b.lane[i]; });
}
inline I32x16 bits_of(F32x16 a) {
    return map_lanes<I32x16>([&](int i) { return std::bit_cast<int32_t>(a.lane[i]); });
}
inline F32x16 float_of_bits(I32x16 a) {
    return map_lanes<F32x16>([&](int i) { return std::bit_cast<float>(a.lane[i]); });
}
inline F32x16 to_float(I32x16 a) {
    return map_lanes<F32x16>([&](int i) { return static_cast<float>(a.lane[i]); });
}
inline I32x16 add(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) {
        return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) +
                                    static_cast<uint32_t>(b.lane[i]));
    });
}
inline I32x16 sub(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) {
        return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) -
                                    static_cast<uint32_t>(b.lane[i]));
    });
}
template <int kBits>
I32x16 shift_left(I32x16 a) {
    return map_lanes<I32x16>(
        [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << kBits); });
}
template <int kBits>
I32x16 shift_right_arithmetic(I32x16 a) {
    return map_lanes<I32x16>([&](int i) { return a.lane[i] >> kBits; });
}
inline I32x16 bit_and(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline I32x16 bit_or(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) { return a.lane[i] | b.lane[i]; });
}
inline I32x16 bit_xor(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline I32x16 max(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
/// Lanes 0, 2, 4, ... of a and then of b, or lanes 1, 3, 5, ...
template <bool kSecond>
I32x16 every_other(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>(
        [&](int i) { return (i < kLanes / 2 ? a : b).lane[2 * i % kLanes + kSecond]; });
}
inline I32x16 min(I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
/// The first `count` lanes of a, then those of b.
inline I32x16 first_lanes(int count, I32x16 a, I32x16 b) {
    return map_lanes<I32x16>([&](int i) { return i < count ? a.lane[i] : b.lane[i]; });
}
/// The largest of the sixteen, in every lane.
inline I32x16 max_lanes(I32x16 a) {
    int32_t result = a.lane[0];
    for (int i = 1; i < kLanes; ++i) result = a.lane[i] > result ? a.lane[i] : result;
    return I32x16::broadcast(result);
}
inline int32_t first_lane(I32x16 a) { return a.lane[0]; }
/// `a` with one lane of `from`.
inline I32x16 with_lane(I32x16 a, int lane, I32x16 from) {
    a.lane[lane] = from.lane[lane];
    return a;
}
inline uint32_t equal_bits(I32x16 a, I32x16 b) {
    return mask_lanes([&](int i) { return a.lane[i] == b.lane[i]; }).bits;
}

}  // namespace
}  // namespace moecore::cpu
