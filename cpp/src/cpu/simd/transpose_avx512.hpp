#pragma once

// transpose_words on sixteen zmm registers.

#include <immintrin.h>

#include <cstdint>

namespace moecore::cpu {
namespace {

/// column[c] lane r = row[r] lane c: a 16 x 16 transpose of 32-bit elements, in four stages.
inline void transpose(const __m512i (&row)[16], __m512i (&column)[16]) {
    __m512i pairs[16], quads[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
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

inline void transpose_words(const char* rows, int64_t row_bytes, int num_rows, char* lines,
                            int64_t line_bytes, bool past_caches) {
    __m512i row[16], column[16];
    for (int r = 0; r < 16; ++r)
        row[r] = r < num_rows ? _mm512_loadu_si512(rows + r * row_bytes) : _mm512_setzero_si512();
    transpose(row, column);
    if (past_caches) {  // whole lines of memory, which need not be read before
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(lines + c * line_bytes), column[c]);
        return;
    }
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) _mm512_storeu_si512(lines + c * line_bytes, column[c]);
}
inline void flush_stores() { _mm_sfence(); }

}  // namespace
}  // namespace moecore::cpu
