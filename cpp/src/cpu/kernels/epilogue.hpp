#pragma once

// From float32 sums to stored outputs. Included after simd/*.hpp.

#include <cstdint>

#include "cpu/kernel_table.hpp"
#include "cpu/kernels/combine.hpp"
#include "cpu/kernels/math.hpp"

namespace moecore::cpu {
namespace {

/// g' * sigmoid(alpha * g') * (u' + up_offset), g' and u' clamped. NaN passes through both clamps.
inline F32x16 clamped_swiglu(F32x16 gate, F32x16 up, const GroupedGemmConfig& config) {
    const F32x16 high = F32x16::broadcast(config.limit);
    const F32x16 low = F32x16::broadcast(-config.limit);
    gate = select(less(high, gate), high, gate);
    up = select(less(high, up), high, up);
    up = select(less(up, low), low, up);
    const F32x16 gated = mul(gate, sigmoid(mul(F32x16::broadcast(config.alpha), gate)));
    return mul(gated, add(up, F32x16::broadcast(config.up_offset)));
}

/// 0.5 * g * (1 + tanh(z)) is g * sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3).
inline F32x16 gelu_tanh(F32x16 gate) {
    const F32x16 cube = mul(mul(gate, gate), gate);
    const F32x16 z = fma(F32x16::broadcast(0.044715f), cube, gate);
    return mul(gate, sigmoid(mul(F32x16::broadcast(1.5957691216057308f), z)));
}

inline F32x16 activate(F32x16 gate, F32x16 up, const GroupedGemmConfig& config) {
    switch (config.activation) {
        case Activation::kSwiglu:
            return mul(mul(gate, sigmoid(gate)), up);
        case Activation::kClampedSwiglu:
            return clamped_swiglu(gate, up, config);
        case Activation::kGeluTanh:
            return mul(gelu_tanh(gate), up);
        case Activation::kNone:
            break;
    }
    return gate;
}

inline void store_tile(const EpilogueTile& tile) {
    const bool gated = is_gated(tile.config.activation);
    const auto sum = [&](int row, int column) {
        F32x16 x = F32x16::load(tile.sums + row * kPanelColumns + column);
        return tile.bias == nullptr ? x : add(x, F32x16::load(tile.bias + column));
    };
    for (int row = 0; row < tile.num_rows; ++row) {
        for (int column = 0; column < tile.num_columns; column += kLanes) {
            F32x16 x = sum(row, column);
            if (gated) x = activate(x, sum(row, column + kPanelColumns / 2), tile.config);
            const int left = tile.num_columns - column;
            store_columns(x, tile.output_dtype, tile.output, row * tile.output_stride + column,
                          left < kLanes ? left : kLanes);
        }
    }
}

}  // namespace
}  // namespace moecore::cpu
