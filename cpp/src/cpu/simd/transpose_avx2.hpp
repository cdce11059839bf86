#pragma once

// transpose_words as four 8 x 8 transposes.

#include <immintrin.h>

#include <cstdint>

namespace moecore::cpu {
namespace {

/// column[c] lane r = row[r] lane c: an 8 x 8 transpose of 32-bit words, in three stages.
inline void transpose(const __m256i (&row)[8], __m256i (&column)[8]) {
    __m256i pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    // Half b of quads[4 g + j] now holds rows 4 g .. 4 g + 3 of column 4 b + j.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        column[j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x20);
        column[4 + j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x31);
    }
}

inline void transpose_words(const char* rows, int64_t row_bytes, int num_rows, char* lines,
                            int64_t line_bytes, [[maybe_unused]] bool past_caches) {
    constexpr int kHalfBytes = 32;
    for (int first_row = 0; first_row < 16; first_row += 8)
        for (int half = 0; half < 2; ++half) {
            __m256i row[8], column[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const int r = first_row + i;
                row[i] = r < num_rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                            rows + r * row_bytes + half * kHalfBytes))
                                      : _mm256_setzero_si256();
            }
            transpose(row, column);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
                _mm256_storeu_si256(
                    reinterpret_cast<__m256i*>(lines + (8 * half + i) * line_bytes + 4 * first_row),
                    column[i]);
        }
}
inline void flush_stores() {}  // half a line at a time is no gain

}  // namespace
}  // namespace moecore::cpu
