#pragma once

// Panel products on zmm registers: 6 rows x 64 columns are 24 accumulators, 4 registers of weights
// and one broadcast. Included after simd/avx512.hpp. kBlockVectors columns of 16 at a time; the
// order along K is the same for every kRows and every block.

#include <cstdint>

#include "cpu/kernel_table.hpp"

namespace moecore::cpu {
namespace {

constexpr int kPanelVectors = kPanelColumns / kLanes;

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

template <int kRows, int kVectors>
void multiply_f32(const GemmTile& tile) {
    const float* line = static_cast<const float*>(tile.panel);
    const float* row[kRows];
    for (int m = 0; m < kRows; ++m) row[m] = static_cast<const float*>(tile.rows[m]);
    __m512 sum[kRows][kVectors];
    load_sums<kRows, kVectors>(tile, 0, sum);
    for (int64_t k = 0; k < tile.k_dim; ++k, line += kPanelColumns) {
        __m512 w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) w[v] = _mm512_loadu_ps(line + v * kLanes);
#pragma GCC unroll 6
        for (int m = 0; m < kRows; ++m) {
            const __m512 x = _mm512_set1_ps(row[m][k]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_fmadd_ps(x, w[v], sum[m][v]);
        }
    }
    store_sums<kRows, kVectors>(tile, 0, sum);
}

template <int kRows>
void tile_f32(const GemmTile& tile) {
    if (tile.num_columns == kPanelColumns)
        multiply_f32<kRows, kPanelVectors>(tile);
    else
        multiply_f32<kRows, kPanelVectors / 2>(tile);
}

}  // namespace
}  // namespace moecore::cpu
