#pragma once

// Rotary position embedding of a range of tokens. Included after simd/*.hpp.

#include <cstdint>
#include <cstring>

#include "cpu/kernels/combine.hpp"
#include "cpu/kernels/round.hpp"
#include "moecore/kernels/rotary_embedding.hpp"

namespace moecore::cpu {
namespace {

/// Sixteen pairs and their angles.
struct Rotation {
    F32x16 cosine, sine;
    void turn(F32x16& a, F32x16& b) const {
        const F32x16 minus_sine = sub(F32x16::broadcast(0.0f), sine);
        const F32x16 turned = fma(a, cosine, mul(b, minus_sine));
        b = fma(b, cosine, mul(a, sine));
        a = turned;
    }
};

template <bool kBFloat16>
void rotate_halves(const RotaryEmbeddingArgs& args, const Rotation& rotation, int64_t offset,
                   int count) {
    const int64_t half = args.rotary_dim / 2;
    F32x16 a = load_columns<kBFloat16>(args.x, offset, count);
    F32x16 b = load_columns<kBFloat16>(args.x, offset + half, count);
    rotation.turn(a, b);
    store_columns(a, args.dtype, args.x, offset, count);
    store_columns(b, args.dtype, args.x, offset + half, count);
}

/// Sixteen pairs of bfloat16, each one word: the first element is its lower half.
inline void rotate_words(const RotaryEmbeddingArgs& args, const Rotation& rotation,
                         int64_t offset) {
    uint16_t* pairs = static_cast<uint16_t*>(args.x) + offset;
    int32_t words[kLanes];
    std::memcpy(words, pairs, sizeof words);
    const I32x16 pair = I32x16::load(words), upper = I32x16::broadcast(-0x10000);
    F32x16 a = float_of_bits(shift_left<16>(pair)), b = float_of_bits(bit_and(pair, upper));
    rotation.turn(a, b);
    const auto quiet = [](F32x16 x) {
        // A NaN whose payload lies in the lower half alone would become an infinity.
        return select(is_nan(x), F32x16::broadcast(__builtin_nanf("")), rounded<true>(x));
    };
    const I32x16 low =
        bit_and(shift_right_arithmetic<16>(bits_of(quiet(a))), I32x16::broadcast(0xffff));
    bit_xor(low, bit_and(bits_of(quiet(b)), upper)).store(words);
    std::memcpy(pairs, words, sizeof words);
}

template <bool kBFloat16>
void rotate_interleaved(const RotaryEmbeddingArgs& args, const Rotation& rotation, int64_t offset,
                        int count) {
    if (kBFloat16 && count == kLanes) return rotate_words(args, rotation, offset);
    const int low = 2 * count < kLanes ? 2 * count : kLanes, high = 2 * count - low;
    float lanes[2 * kLanes], even[kLanes], odd[kLanes];
    const auto zero = F32x16::broadcast(0.0f);
    load_columns<kBFloat16>(args.x, offset, low).store(lanes);
    (high > 0 ? load_columns<kBFloat16>(args.x, offset + kLanes, high) : zero)
        .store(lanes + kLanes);
    for (int i = 0; i < kLanes; ++i) {
        even[i] = lanes[2 * i];
        odd[i] = lanes[2 * i + 1];
    }
    F32x16 a = F32x16::load(even), b = F32x16::load(odd);
    rotation.turn(a, b);
    a.store(even);
    b.store(odd);
    for (int i = 0; i < kLanes; ++i) {
        lanes[2 * i] = even[i];
        lanes[2 * i + 1] = odd[i];
    }
    store_columns(F32x16::load(lanes), args.dtype, args.x, offset, low);
    if (high > 0)
        store_columns(F32x16::load(lanes + kLanes), args.dtype, args.x, offset + kLanes, high);
}

template <bool kBFloat16>
void rotate(const RotaryEmbeddingArgs& args, int64_t begin, int64_t end) {
    const int64_t half = args.rotary_dim / 2;
    const bool interleaved = args.pairs == RotaryPairs::kInterleaved;
    for (int64_t token = begin; token < end; ++token) {
        const int64_t angles = args.positions[token] * args.cos_sin_stride;
        for (int64_t i = 0; i < half; i += kLanes) {
            const int count = static_cast<int>(half - i < kLanes ? half - i : kLanes);
            const Rotation rotation{load_columns<false>(args.cos_sin, angles + i, count),
                                    load_columns<false>(args.cos_sin, angles + half + i, count)};
            for (int64_t head = 0; head < args.num_heads; ++head) {
                const int64_t row = token * args.token_stride + head * args.head_stride;
                if (interleaved)
                    rotate_interleaved<kBFloat16>(args, rotation, row + 2 * i, count);
                else
                    rotate_halves<kBFloat16>(args, rotation, row + i, count);
            }
        }
    }
}

inline void rotate_tokens(const RotaryEmbeddingArgs& args, int64_t begin, int64_t end) {
    if (args.dtype == DType::kBFloat16)
        rotate<true>(args, begin, end);
    else
        rotate<false>(args, begin, end);
}

}  // namespace
}  // namespace moecore::cpu
