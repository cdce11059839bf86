// AVX-512 with vdpbf16ps: one instruction multiplies sixteen pairs and adds both products.

#include "cpu/simd/avx512.hpp"
#include "cpu/simd/transpose_avx512.hpp"

#include "cpu/kernels/gemm_avx512.hpp"
#include "cpu/kernels/table.hpp"

namespace moecore::cpu {
namespace {

template <int kRows, int kVectors>
void add_pairs(const uint16_t* line, const int32_t (&pair)[kRows], __m512 (&sum)[kRows][kVectors]) {
    __m512bh w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(line + 2 * v * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair[m]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], x, w[v]);
    }
}

template <int kRows, int kVectors>
void multiply_bf16(const GemmTile& tile) {
    const uint16_t* line = static_cast<const uint16_t*>(tile.panel);
    const uint16_t* row[kRows];
    for (int m = 0; m < kRows; ++m) row[m] = static_cast<const uint16_t*>(tile.rows[m]);
    __m512 sum[kRows][kVectors];
    load_sums<kRows, kVectors>(tile, 0, sum);
    int32_t pair[kRows];
    int64_t k = 0;
    for (; k + 1 < tile.k_dim; k += 2, line += 2 * kPanelColumns) {
#pragma GCC unroll 6
        for (int m = 0; m < kRows; ++m) __builtin_memcpy(&pair[m], row[m] + k, sizeof pair[m]);
        add_pairs<kRows, kVectors>(line, pair, sum);
    }
    if (k < tile.k_dim) {
        for (int m = 0; m < kRows; ++m) pair[m] = load_pair(row[m] + k, false);
        add_pairs<kRows, kVectors>(line, pair, sum);
    }
    store_sums<kRows, kVectors>(tile, 0, sum);
}

template <int kRows>
void tile_bf16(const GemmTile& tile) {
    if (tile.num_columns == kPanelColumns)
        multiply_bf16<kRows, kPanelVectors>(tile);
    else
        multiply_bf16<kRows, kPanelVectors / 2>(tile);
}

}  // namespace

const KernelTable& avx512_bf16_kernels() {
    static const KernelTable table = table_of("avx512_bf16");
    return table;
}

}  // namespace moecore::cpu
