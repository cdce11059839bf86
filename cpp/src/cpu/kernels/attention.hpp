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

inline void load_scores(const SoftmaxTile& tile, int row, F32x16 (&score)[kScoreVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kScoreVectors; ++v)
        score[v] = F32x16::load(tile.scores + row * kPanelColumns + v * kLanes);
    if (tile.num_keys[row] < kPanelColumns) mask_scores(score, tile.num_keys[row]);
}

/// The largest score so far. It skips NaN, which then comes through 2^x.
inline float new_maximum(const SoftmaxTile& tile, int row) {
    F32x16 score[kScoreVectors];
    load_scores(tile, row, score);
    const auto before =
        F32x16::broadcast(tile.is_first ? -__builtin_huge_valf() : tile.maxima[row]);
    return reduce_max(
        max(max(score[0], max(score[1], before)), max(score[2], max(score[3], before))));
}

/// Stores one row's weights and returns their sums.
template <bool kBFloat16>
F32x16 weigh_row(const SoftmaxTile& tile, int row, float maximum) {
    F32x16 weight[kScoreVectors];
    load_scores(tile, row, weight);
    const F32x16 scale = F32x16::broadcast(tile.scale);
    const F32x16 shift = F32x16::broadcast(-(maximum * tile.scale));
#pragma GCC unroll 4
    for (int v = 0; v < kScoreVectors; ++v) {
        weight[v] = exp2_to_normal(fma(weight[v], scale, shift));
        const int offset = row * kPanelColumns + v * kLanes;
        if constexpr (kBFloat16)
            store_normal_bf16(weight[v], static_cast<uint16_t*>(tile.weights) + offset);
        else
            weight[v].store(static_cast<float*>(tile.weights) + offset);
    }
    return add(add(weight[0], weight[1]), add(weight[2], weight[3]));
}

/// What has been added up before had a smaller maximum taken off.
inline F32x16 rescale_row(const SoftmaxTile& tile, int row, float before, float after) {
    const F32x16 factor =
        exp2_to_normal(F32x16::broadcast(before * tile.scale - after * tile.scale));
    for (int panel = 0; panel < tile.num_panels; ++panel) {
        float* output = tile.output + panel * tile.panel_stride + row * kPanelColumns;
#pragma GCC unroll 4
        for (int v = 0; v < kScoreVectors; ++v)
            mul(F32x16::load(output + v * kLanes), factor).store(output + v * kLanes);
    }
    return mul(F32x16::load(tile.sums + row * kLanes), factor);
}

template <bool kBFloat16>
void softmax(const SoftmaxTile& tile) {
    // 1. Maxima of all rows first: each is one long chain of dependent steps.
    float maxima[kMaxTileRows];
    for (int row = 0; row < tile.num_rows; ++row) maxima[row] = new_maximum(tile, row);

    // 2. Weights and their sums.
    for (int row = 0; row < tile.num_rows; ++row) {
        F32x16 sum = weigh_row<kBFloat16>(tile, row, maxima[row]);
        float* sums = tile.sums + row * kLanes;
        if (!tile.is_first) {
            const float before = tile.maxima[row];
            sum = add(sum, maxima[row] == before ? F32x16::load(sums)
                                                 : rescale_row(tile, row, before, maxima[row]));
        }
        sum.store(sums);
        tile.maxima[row] = maxima[row];
    }
}

inline void softmax_rows(const SoftmaxTile& tile) {
    if (tile.dtype == DType::kBFloat16)
        softmax<true>(tile);
    else
        softmax<false>(tile);
}

inline bool store_attention_row(const AttentionRow& row) {
    const F32x16 zero = F32x16::broadcast(0.0f);
    const F32x16 factor = F32x16::broadcast(1.0f / reduce_add(F32x16::load(row.sums)));
    F32x16 poison = zero;
    for (int64_t d = 0; d < row.head_dim; d += kLanes) {
        const float* sums = row.output + d / kPanelColumns * row.panel_stride + d % kPanelColumns;
        // + 0 makes one zero of both: which one is left depends on keys of weight 0.
        const F32x16 x = add(mul(F32x16::load(sums), factor), zero);
        const int count = static_cast<int>(row.head_dim - d < kLanes ? row.head_dim - d : kLanes);
        poison = fma(x, zero, poison);
        store_columns(x, row.dtype, row.target, d, count);
    }
    return reduce_add(poison) == 0.0f;
}

}  // namespace
}  // namespace moecore::cpu
