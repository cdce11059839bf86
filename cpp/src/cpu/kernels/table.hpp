#pragma once

// Every kernel of a variant but its products, and the table of all. Included after simd/*.hpp and
// simd/transpose_*.hpp.

#include "cpu/kernel_table.hpp"
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

/// kRows rows times one panel: the variant defines them.
template <int kRows>
void tile_bf16(const GemmTile& tile);
template <int kRows>
void tile_f32(const GemmTile& tile);

inline KernelTable table_of(const char* name) {
    return {
        .name = name,
        .route = route_tokens,
        .tile_bf16 = {nullptr, tile_bf16<1>, tile_bf16<2>, tile_bf16<3>, tile_bf16<4>, tile_bf16<5>,
                      tile_bf16<6>},
        .tile_f32 = {nullptr, tile_f32<1>, tile_f32<2>, tile_f32<3>, tile_f32<4>, tile_f32<5>,
                     tile_f32<6>},
        .epilogue = store_tile,
        .pack_bf16 = pack_lanes_bf16,
        .pack_f32 = pack_lanes_f32,
        .flush_stores = flush_stores,
        .combine = combine_tokens,
        .rms_norm = rms_norm_rows,
        .rotary_embedding = rotate_tokens,
        .softmax = softmax_rows,
        .attention_row = store_attention_row,
        .draw_tokens = draw_rows,
    };
}

}  // namespace
}  // namespace moecore::cpu
