// AVX-512 F/BW/DQ/VL without bfloat16 instructions: pairs are widened to two float32 products, even
// element first. Thirty-two columns at a time.

#include "cpu/simd/avx512.hpp"
#include "cpu/simd/transpose_avx512.hpp"

#include "cpu/kernels/gemm_avx512.hpp"
#include "cpu/kernels/table.hpp"

namespace moecore::cpu {
namespace {

__m512 even_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
__m512 odd_half(__m512i pairs) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

template <int kRows>
void tile_bf16(const GemmTile& tile) {
    constexpr int kVectors = 2;
    const int64_t num_pairs = (tile.k_dim + 1) / 2;
    const int64_t whole_pairs = tile.k_dim / 2;
    for (int block = 0; block < tile.num_columns; block += kVectors * kLanes) {
        __m512 sum[kRows][kVectors];
        load_sums<kRows, kVectors>(tile, block, sum);
        const uint16_t* line = static_cast<const uint16_t*>(tile.panel) + 2 * block;
        for (int64_t p = 0; p < num_pairs; ++p, line += 2 * kPanelColumns) {
            const __m512i w0 = _mm512_loadu_si512(line), w1 = _mm512_loadu_si512(line + 32);
#pragma GCC unroll 6
            for (int m = 0; m < kRows; ++m) {
                const __m512i x = _mm512_set1_epi32(
                    load_pair(static_cast<const uint16_t*>(tile.rows[m]) + 2 * p, p < whole_pairs));
                const __m512 x_even = even_half(x), x_odd = odd_half(x);
                sum[m][0] = _mm512_fmadd_ps(x_even, even_half(w0), sum[m][0]);
                sum[m][1] = _mm512_fmadd_ps(x_even, even_half(w1), sum[m][1]);
                sum[m][0] = _mm512_fmadd_ps(x_odd, odd_half(w0), sum[m][0]);
                sum[m][1] = _mm512_fmadd_ps(x_odd, odd_half(w1), sum[m][1]);
            }
        }
        store_sums<kRows, kVectors>(tile, block, sum);
    }
}

}  // namespace

const KernelTable& avx512_kernels() {
    static const KernelTable table = table_of("avx512");
    return table;
}

}  // namespace moecore::cpu
