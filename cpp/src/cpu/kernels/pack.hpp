#pragma once

// Rows of weights into a panel's column order; the same bytes on every instruction set. Included
// after simd/*.hpp and simd/transpose_*.hpp.

#include <cstdint>

#include "cpu/kernel_table.hpp"

namespace moecore::cpu {
namespace {

constexpr int64_t kLineBytes = kPanelColumns * 4;  ///< one k of float32, two of bfloat16

/// Steps of K to ask for ahead of use: each is a page of its own when N is contiguous, where no
/// hardware prefetcher follows.
constexpr int64_t kPackAhead = kPackBlockK;

/// Asks for the line that is `elements` away. May point past the matrix: it is never read.
template <typename Element>
void prefetch(const Element* from, int64_t elements) {
    const auto address =
        reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(elements) * sizeof(Element);
    __builtin_prefetch(reinterpret_cast<const void*>(address));
}

/// One element after the other: any strides, any number of rows.
inline void pack_elements(const PackLanes& lanes, const uint16_t* source, uint16_t* panel) {
    for (int64_t k = 0; k < lanes.k_dim; k += 2) {
        uint16_t* line = panel + k * kPanelColumns;
        const bool has_second = k + 1 < lanes.k_dim;
        for (int c = 0; c < kLanes; ++c) {
            const bool present = c < lanes.num_rows;
            const uint16_t* element = source + c * lanes.row_stride + k * lanes.k_stride;
            line[2 * c] = present ? element[0] : uint16_t{0};
            line[2 * c + 1] = present && has_second ? element[lanes.k_stride] : uint16_t{0};
        }
    }
}

inline void pack_elements(const PackLanes& lanes, const float* source, float* panel) {
    for (int64_t k = 0; k < lanes.k_dim; ++k)
        for (int c = 0; c < kLanes; ++c)
            panel[k * kPanelColumns + c] =
                c < lanes.num_rows ? source[c * lanes.row_stride + k * lanes.k_stride] : 0.0f;
}

/// Sixteen rows whose elements of one k are read together: columns(p) gives them as 32-bit lanes,
/// for bfloat16 in the low halves.
template <typename Columns>
void pack_columns(const PackLanes& lanes, const uint16_t* source, uint16_t* panel,
                  Columns&& columns) {
    for (int64_t k = 0; k < lanes.k_dim; k += 2, panel += 2 * kPanelColumns) {
        const uint16_t* line = source + k * lanes.k_stride;
        prefetch(line, kPackAhead * lanes.k_stride);
        prefetch(line, (kPackAhead + 1) * lanes.k_stride);
        I32x16 pair = columns(line);
        if (k + 1 < lanes.k_dim)
            pair = bit_or(pair, shift_left<16>(columns(line + lanes.k_stride)));
        pair.store(reinterpret_cast<int32_t*>(panel));
    }
}

template <typename Columns>
void pack_columns(const PackLanes& lanes, const float* source, float* panel, Columns&& columns) {
    for (int64_t k = 0; k < lanes.k_dim; ++k, panel += kPanelColumns) {
        const float* line = source + k * lanes.k_stride;
        prefetch(line, kPackAhead * lanes.k_stride);
        columns(line).store(reinterpret_cast<int32_t*>(panel));
    }
}

inline I32x16 load_columns(const uint16_t* p) { return I32x16::load_u16(p); }
inline I32x16 load_columns(const float* p) {
    return I32x16::load(reinterpret_cast<const int32_t*>(p));
}

/// Of sixteen pairs of elements the first ones, or the second ones.
template <bool kSecond>
I32x16 load_of_pairs(const uint16_t* pairs) {
    const I32x16 both = I32x16::load(reinterpret_cast<const int32_t*>(pairs));
    return bit_and(kSecond ? shift_right_arithmetic<16>(both) : both, I32x16::broadcast(0xffff));
}
template <bool kSecond>
I32x16 load_of_pairs(const float* pairs) {
    const auto* p = reinterpret_cast<const int32_t*>(pairs);
    return every_other<kSecond>(I32x16::load(p), I32x16::load(p + kLanes));
}

/// Rows contiguous in K: blocks of sixteen 32-bit words (pairs of bfloat16, or floats) of sixteen
/// rows, transposed. Returns how much of K that was.
template <typename Element>
int64_t pack_transposed(const PackLanes& lanes, const Element* source, Element* panel) {
    constexpr int64_t kStep = kLanes * 4 / sizeof(Element);  // of K
    int64_t k = 0;
    for (; k + kStep <= lanes.k_dim; k += kStep)
        transpose_words(reinterpret_cast<const char*>(source + k),
                        lanes.row_stride * static_cast<int64_t>(sizeof(Element)), lanes.num_rows,
                        reinterpret_cast<char*>(panel + k * kPanelColumns), kLineBytes,
                        lanes.past_caches);
    return k;
}

template <typename Element>
void pack_lanes(const PackLanes& lanes) {
    const auto* source = static_cast<const Element*>(lanes.source);
    auto* panel = static_cast<Element*>(lanes.panel);
    const bool is_full = lanes.num_rows == kLanes;
    if (is_full && lanes.row_stride == 1)
        return pack_columns(lanes, source, panel, [](auto* p) { return load_columns(p); });
    if (is_full && lanes.place_in_pair == 0)
        return pack_columns(lanes, source, panel, [](auto* p) { return load_of_pairs<false>(p); });
    if (is_full && lanes.place_in_pair == 1)
        return pack_columns(lanes, source - 1, panel,
                            [](auto* p) { return load_of_pairs<true>(p); });
    const int64_t done =
        lanes.k_stride == 1 && lanes.num_rows > 0 ? pack_transposed(lanes, source, panel) : 0;
    if (done == lanes.k_dim) return;
    PackLanes rest = lanes;
    rest.k_dim -= done;
    pack_elements(rest, source + done, panel + done * kPanelColumns);
}

inline void pack_lanes_bf16(const PackLanes& lanes) { pack_lanes<uint16_t>(lanes); }
inline void pack_lanes_f32(const PackLanes& lanes) { pack_lanes<float>(lanes); }

}  // namespace
}  // namespace moecore::cpu
