#pragma once

// The plain form of transpose_words; simd/transpose_*.hpp hold those of the vector units.

#include <cstdint>
#include <cstring>

namespace moecore::cpu {
namespace {

/// Word r of line c = word c of row r, for sixteen 32-bit words of up to sixteen rows. Rows and
/// lines lie row_bytes and line_bytes apart; rows past num_rows count as zeros. With past_caches
/// each line begins at a multiple of 64 bytes; it may be written around the caches, and
/// flush_stores() makes such writes visible to others.
inline void transpose_words(const char* rows, int64_t row_bytes, int num_rows, char* lines,
                            int64_t line_bytes, [[maybe_unused]] bool past_caches) {
    for (int c = 0; c < 16; ++c)
        for (int r = 0; r < 16; ++r) {
            int32_t word = 0;
            if (r < num_rows) std::memcpy(&word, rows + r * row_bytes + 4 * c, sizeof word);
            std::memcpy(lines + c * line_bytes + 4 * r, &word, sizeof word);
        }
}
inline void flush_stores() {}

}  // namespace
}  // namespace moecore::cpu
