#pragma once

// Rows of weights into a panel's column order. Plain C++; the same bytes on every instruction set.

#include <cstdint>

#include "cpu/kernel_table.hpp"

namespace moecore::cpu {
namespace {

/// bfloat16: column c of pair p holds elements 2 p and 2 p + 1 of row c.
inline void pack_lanes_bf16(const PackLanes& lanes) {
    const uint16_t* source = static_cast<const uint16_t*>(lanes.source);
    uint16_t* panel = static_cast<uint16_t*>(lanes.panel);
    for (int64_t k = 0; k < lanes.k_dim; k += 2) {
        uint16_t* line = panel + k * kPanelColumns;
        const bool has_second = k + 1 < lanes.k_dim;
        for (int c = 0; c < 16; ++c) {
            const uint16_t* element = source + c * lanes.row_stride + k * lanes.k_stride;
            const bool present = c < lanes.num_rows;
            line[2 * c] = present ? element[0] : uint16_t{0};
            line[2 * c + 1] = present && has_second ? element[lanes.k_stride] : uint16_t{0};
        }
    }
}

inline void pack_lanes_f32(const PackLanes& lanes) {
    const float* source = static_cast<const float*>(lanes.source);
    float* panel = static_cast<float*>(lanes.panel);
    for (int64_t k = 0; k < lanes.k_dim; ++k)
        for (int c = 0; c < 16; ++c)
            panel[k * kPanelColumns + c] =
                c < lanes.num_rows ? source[c * lanes.row_stride + k * lanes.k_stride] : 0.0f;
}

}  // namespace
}  // namespace moecore::cpu
