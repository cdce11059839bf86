#pragma once

// Panel products on zmm registers: 6 rows x 64 columns are 24 accumulators, 4 registers of weights
// and one broadcast. Included after simd/avx512.hpp. kBlockVectors columns of 16 at a time; the
// order along K is the same for every kRows and every block.

#include <cstdint>

#include "cpu/kernel_table.hpp"
#include "cpu/kernels/pack.hpp"

namespace moecore::cpu {
namespace {

constexpr int kPanelVectors = kPanelColumns / kLanes;

/// Bytes of the panel to ask for ahead of use. Tiles of few rows run at memory speed and leave
/// panels faster than the hardware prefetcher follows across 4 KiB pages.
constexpr int kPrefetchBytes = 4096;
constexpr int kPrefetchMaxRows = 4;

template <int kRows, int kVectors>
void load_sums(const GemmTile& tile, int first, __m512 (&sum)[kRows][kVectors]) {
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            sum[m][v] = tile.accumulate
                            ? _mm512_loadu_ps(tile.sums + m * kPanelColumns + first + v * kLanes)
                            : _mm512_setzero_ps();
}

template <int kRows, int kVectors>
void store_sums(const GemmTile& tile, int first, const __m512 (&sum)[kRows][kVectors]) {
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            _mm512_storeu_ps(tile.sums + m * kPanelColumns + first + v * kLanes, sum[m][v]);
}

/// The pair of elements at `p`, or one element and a zero.
inline int32_t load_pair(const uint16_t* p, bool both) {
    uint32_t pair = p[0];
    if (both) __builtin_memcpy(&pair, p, sizeof pair);
    return static_cast<int32_t>(pair);
}

template <int kRows>
void tile_f32(const GemmTile& tile) {
    const float* line = static_cast<const float*>(tile.panel);
    const float* row[kRows];
    for (int m = 0; m < kRows; ++m) row[m] = static_cast<const float*>(tile.rows[m]);
    __m512 sum[kRows][kPanelVectors];
    load_sums<kRows, kPanelVectors>(tile, 0, sum);
    for (int64_t k = 0; k < tile.k_dim; ++k, line += kPanelColumns) {
        __m512 w[kPanelVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) {
            w[v] = _mm512_loadu_ps(line + v * kLanes);
            if constexpr (kRows <= kPrefetchMaxRows)
                _mm_prefetch(reinterpret_cast<const char*>(line + v * kLanes) + kPrefetchBytes,
                             _MM_HINT_T0);
        }
#pragma GCC unroll 6
        for (int m = 0; m < kRows; ++m) {
            const __m512 x = _mm512_set1_ps(row[m][k]);
#pragma GCC unroll 4
            for (int v = 0; v < kPanelVectors; ++v) sum[m][v] = _mm512_fmadd_ps(x, w[v], sum[m][v]);
        }
    }
    store_sums<kRows, kPanelVectors>(tile, 0, sum);
}

/// column[c] lane r = row[r] lane c: a 16 x 16 transpose of 32-bit elements, in four stages.
inline void transpose(const __m512i (&row)[kLanes], __m512i (&column)[kLanes]) {
    __m512i pairs[kLanes], quads[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    // Block b of quads[4 g + j] now holds rows 4 g .. 4 g + 3 of column 4 b + j.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i even_low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
        column[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        column[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        column[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        column[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

/// pack_lanes_bf16 and pack_lanes_f32 for rows contiguous in K: sixteen 32-bit words (pairs of
/// bfloat16, or floats) of sixteen rows at a time. What is left of K, and other layouts, take the
/// plain way.
template <typename Element>
void pack_lanes(const PackLanes& lanes) {
    constexpr int64_t kStep = kLanes * 4 / sizeof(Element);  // of K
    constexpr auto pack_rest = sizeof(Element) == 2 ? pack_lanes_bf16 : pack_lanes_f32;
    if (lanes.k_stride != 1) return pack_rest(lanes);
    const Element* source = static_cast<const Element*>(lanes.source);
    char* panel = static_cast<char*>(lanes.panel);
    constexpr int64_t kLineBytes = kPanelColumns * 4;
    int64_t k = 0;
    for (; k + kStep <= lanes.k_dim; k += kStep) {
        __m512i row[kLanes], column[kLanes];
        for (int r = 0; r < kLanes; ++r)
            row[r] = r < lanes.num_rows ? _mm512_loadu_si512(source + r * lanes.row_stride + k)
                                        : _mm512_setzero_si512();
        transpose(row, column);
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c, panel += kLineBytes) _mm512_storeu_si512(panel, column[c]);
    }
    if (k == lanes.k_dim) return;
    PackLanes rest = lanes;
    rest.source = lanes.num_rows > 0 ? source + k : source;
    rest.k_dim = lanes.k_dim - k;
    rest.panel = panel;
    pack_rest(rest);
}

}  // namespace
}  // namespace moecore::cpu
