// Plain C++: any processor. Column after column of each panel, K in order.

#include "cpu/simd/scalar.hpp"
#include "cpu/simd/transpose_scalar.hpp"

#include "cpu/kernels/attention.hpp"
#include "cpu/kernels/combine.hpp"
#include "cpu/kernels/draw_tokens.hpp"
#include "cpu/kernels/epilogue.hpp"
#include "cpu/kernels/math.hpp"
#include "cpu/kernels/pack.hpp"
#include "cpu/kernels/rms_norm.hpp"
#include "cpu/kernels/rotary.hpp"
#include "cpu/kernels/route.hpp"

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
    static const KernelTable table{
        "scalar",
        route_tokens,
        {nullptr, tile_bf16<1>, tile_bf16<2>, tile_bf16<3>, tile_bf16<4>, tile_bf16<5>,
         tile_bf16<6>},
        {nullptr, tile_f32<1>, tile_f32<2>, tile_f32<3>, tile_f32<4>, tile_f32<5>, tile_f32<6>},
        store_tile,
        pack_lanes_bf16,
        pack_lanes_f32,
        combine_tokens,
        rms_norm_rows,
        rotate_tokens,
        softmax_rows,
        store_attention_row,
        draw_rows,
    };
    return table;
}

}  // namespace moecore::cpu
