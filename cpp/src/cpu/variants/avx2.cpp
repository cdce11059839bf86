// AVX2 + FMA: sixteen columns of a panel at a time, two ymm accumulators a row.

#include "cpu/simd/avx2.hpp"
#include "cpu/simd/transpose_avx2.hpp"

#include "cpu/kernels/table.hpp"

namespace moecore::cpu {
namespace {

constexpr int kBlockColumns = 16;  ///< two ymm accumulators a row: twelve for six rows

__m256 even_half(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
__m256 odd_half(__m256i pairs) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

/// The pair of elements at `p`, or one element and a zero.
int32_t load_pair(const uint16_t* p, bool both) {
    uint32_t pair = p[0];
    if (both) __builtin_memcpy(&pair, p, sizeof pair);
    return static_cast<int32_t>(pair);
}

template <int kRows>
void tile_bf16(const GemmTile& tile) {
    const int64_t num_pairs = (tile.k_dim + 1) / 2;
    const int64_t whole_pairs = tile.k_dim / 2;
    for (int block = 0; block < tile.num_columns; block += kBlockColumns) {
        __m256 sum[kRows][2];
        for (int m = 0; m < kRows; ++m)
            for (int h = 0; h < 2; ++h)
                sum[m][h] = tile.accumulate
                                ? _mm256_loadu_ps(tile.sums + m * kPanelColumns + block + 8 * h)
                                : _mm256_setzero_ps();
        const uint16_t* line = static_cast<const uint16_t*>(tile.panel) + 2 * block;
        for (int64_t p = 0; p < num_pairs; ++p, line += 2 * kPanelColumns) {
            const __m256i* w = reinterpret_cast<const __m256i*>(line);
            const __m256i w0 = _mm256_loadu_si256(w), w1 = _mm256_loadu_si256(w + 1);
            __m256i x[kRows];
#pragma GCC unroll 6
            for (int m = 0; m < kRows; ++m)
                x[m] = _mm256_set1_epi32(
                    load_pair(static_cast<const uint16_t*>(tile.rows[m]) + 2 * p, p < whole_pairs));
#pragma GCC unroll 6
            for (int m = 0; m < kRows; ++m) {
                const __m256 x_even = even_half(x[m]), x_odd = odd_half(x[m]);
                sum[m][0] = _mm256_fmadd_ps(x_even, even_half(w0), sum[m][0]);
                sum[m][1] = _mm256_fmadd_ps(x_even, even_half(w1), sum[m][1]);
                sum[m][0] = _mm256_fmadd_ps(x_odd, odd_half(w0), sum[m][0]);
                sum[m][1] = _mm256_fmadd_ps(x_odd, odd_half(w1), sum[m][1]);
            }
        }
        for (int m = 0; m < kRows; ++m)
            for (int h = 0; h < 2; ++h)
                _mm256_storeu_ps(tile.sums + m * kPanelColumns + block + 8 * h, sum[m][h]);
    }
}

template <int kRows>
void tile_f32(const GemmTile& tile) {
    for (int block = 0; block < tile.num_columns; block += kBlockColumns) {
        __m256 sum[kRows][2];
        for (int m = 0; m < kRows; ++m)
            for (int h = 0; h < 2; ++h)
                sum[m][h] = tile.accumulate
                                ? _mm256_loadu_ps(tile.sums + m * kPanelColumns + block + 8 * h)
                                : _mm256_setzero_ps();
        const float* line = static_cast<const float*>(tile.panel) + block;
        for (int64_t k = 0; k < tile.k_dim; ++k, line += kPanelColumns) {
            const __m256 w0 = _mm256_loadu_ps(line), w1 = _mm256_loadu_ps(line + 8);
#pragma GCC unroll 6
            for (int m = 0; m < kRows; ++m) {
                const __m256 x = _mm256_set1_ps(static_cast<const float*>(tile.rows[m])[k]);
                sum[m][0] = _mm256_fmadd_ps(x, w0, sum[m][0]);
                sum[m][1] = _mm256_fmadd_ps(x, w1, sum[m][1]);
            }
        }
        for (int m = 0; m < kRows; ++m)
            for (int h = 0; h < 2; ++h)
                _mm256_storeu_ps(tile.sums + m * kPanelColumns + block + 8 * h, sum[m][h]);
    }
}

}  // namespace

const KernelTable& avx2_kernels() {
    static const KernelTable table = table_of("avx2");
    return table;
}

}  // namespace moecore::cpu
