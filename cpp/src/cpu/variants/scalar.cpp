// Plain C++: any processor. Column after column of each panel, K in order.

#include "cpu/simd/scalar.hpp"
#include "cpu/simd/transpose_scalar.hpp"

#include "cpu/kernels/table.hpp"

namespace moecore::cpu {
namespace {

float widen(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

template <int kRows>
void tile_bf16(const GemmTile& tile) {
    const uint16_t* panel = static_cast<const uint16_t*>(tile.panel);
    for (int row = 0; row < kRows; ++row) {
        const uint16_t* x = static_cast<const uint16_t*>(tile.rows[row]);
        float* sums = tile.sums + row * kPanelColumns;
        if (!tile.accumulate)
            for (int c = 0; c < tile.num_columns; ++c) sums[c] = 0.0f;
        for (int64_t k = 0; k < tile.k_dim; ++k) {
            // A product of two bfloat16 is exact in float32: the sum rounds once, as fma would.
            const uint16_t* line = panel + k / 2 * 2 * kPanelColumns + k % 2;
            const float factor = widen(x[k]);
            for (int c = 0; c < tile.num_columns; ++c) sums[c] += factor * widen(line[2 * c]);
        }
    }
}

template <int kRows>
void tile_f32(const GemmTile& tile) {
    const float* panel = static_cast<const float*>(tile.panel);
    for (int row = 0; row < kRows; ++row) {
        const float* x = static_cast<const float*>(tile.rows[row]);
        float* sums = tile.sums + row * kPanelColumns;
        if (!tile.accumulate)
            for (int c = 0; c < tile.num_columns; ++c) sums[c] = 0.0f;
        for (int64_t k = 0; k < tile.k_dim; ++k)
            for (int c = 0; c < tile.num_columns; ++c)
                sums[c] += x[k] * panel[k * kPanelColumns + c];
    }
}

}  // namespace

const KernelTable& scalar_kernels() {
    static const KernelTable table = table_of("scalar");
    return table;
}

}  // namespace moecore::cpu
