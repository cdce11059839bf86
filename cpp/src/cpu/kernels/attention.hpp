#pragma once

// One key block's softmax on the way from scores to weights, and the rows' end. Included after
// simd/*.hpp.

#include <cstdint>

#include "cpu/kernel_table.hpp"
#include "cpu/kernels/combine.hpp"
#include "cpu/kernels/math.hpp"

namespace moecore::cpu {
namespace {

constexpr int kScoreVectors = kPanelColumns / kLanes;

/// Scores of the keys from num_keys on become -inf, whatever lies there.
inline void mask_scores(F32x16 (&score)[kScoreVectors], int num_keys) {
    alignas(64) static constexpr float kColumn[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                          8, 9, 10, 11, 12, 13, 14, 15};
    const F32x16 column = F32x16::load(kColumn);
    const F32x16 minus_inf = F32x16::broadcast(-__builtin_huge_valf());
#pragma GCC unroll 4
    for (int v = 0; v < kScoreVectors; ++v) {
        const F32x16 end = F32x16::broadcast(static_cast<float>(num_keys - v * kLanes));
        score[v] = select(less(column, end), score[v], minus_inf);
    }
}

template <bool kBFloat16>
void softmax_row(const SoftmaxTile& tile, int row) {
    F32x16 score[kScoreVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kScoreVectors; ++v)
        score[v] = F32x16::load(tile.scores + row * kPanelColumns + v * kLanes);
    if (tile.num_keys[row] < kPanelColumns) mask_scores(score, tile.num_keys[row]);

    // The running maximum skips NaN, which then comes through exp.
    float* sums = tile.sums + row * kLanes;
    const float before = tile.is_first ? -__builtin_huge_valf() : tile.maxima[row];
    const F32x16 largest =
        max(max(score[0], F32x16::broadcast(before)),
            max(score[1], max(score[2], max(score[3], F32x16::broadcast(before)))));
    const float after = reduce_max(largest);
    tile.maxima[row] = after;
    const F32x16 scale = F32x16::broadcast(tile.scale);
    const F32x16 shift = F32x16::broadcast(-(after * tile.scale));
#pragma GCC unroll 4
    for (int v = 0; v < kScoreVectors; ++v) {
        score[v] = exp(fma(score[v], scale, shift));
        store_columns(score[v], kBFloat16 ? DType::kBFloat16 : DType::kFloat32, tile.weights,
                      row * kPanelColumns + v * kLanes, kLanes);
    }
    F32x16 sum = add(add(score[0], score[1]), add(score[2], score[3]));
    if (tile.is_first) return sum.store(sums);
    if (after == before) return add(F32x16::load(sums), sum).store(sums);

    // What has been added up so far had a smaller maximum taken off.
    const F32x16 factor = exp(F32x16::broadcast(before * tile.scale - after * tile.scale));
    fma(F32x16::load(sums), factor, sum).store(sums);
    for (int panel = 0; panel < tile.num_panels; ++panel) {
        float* output = tile.output + panel * tile.panel_stride + row * kPanelColumns;
#pragma GCC unroll 4
        for (int v = 0; v < kScoreVectors; ++v)
            mul(F32x16::load(output + v * kLanes), factor).store(output + v * kLanes);
    }
}

inline void softmax_rows(const SoftmaxTile& tile) {
    for (int row = 0; row < tile.num_rows; ++row) {
        if (tile.dtype == DType::kBFloat16)
            softmax_row<true>(tile, row);
        else
            softmax_row<false>(tile, row);
    }
}

inline bool store_attention_row(const AttentionRow& row) {
    const F32x16 zero = F32x16::broadcast(0.0f);
    const F32x16 factor = F32x16::broadcast(1.0f / reduce_add(F32x16::load(row.sums)));
    F32x16 poison = zero;
    for (int64_t d = 0; d < row.head_dim; d += kLanes) {
        const float* sums = row.output + d / kPanelColumns * row.panel_stride + d % kPanelColumns;
        // + 0 makes one zero of both: which one is left depends on keys of weight 0.
        const F32x16 x = fma(F32x16::load(sums), factor, zero);
        const int count = static_cast<int>(row.head_dim - d < kLanes ? row.head_dim - d : kLanes);
        poison = fma(x, zero, poison);
        store_columns(x, row.dtype, row.target, d, count);
    }
    return reduce_add(poison) == 0.0f;
}

}  // namespace
}  // namespace moecore::cpu
