#pragma once

#include <cstdint>

#include "cpu/kernel_table.hpp"

namespace moecore::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Where a matrix [n, k_dim] lies among panels of 64 columns. A gated panel holds 32 output
/// features: their gates in columns 0 .. 31 and their ups in columns 32 .. 63.
struct PanelLayout {
    int64_t n;
    int64_t k_dim;
    bool gated;
    DType dtype;

    int64_t num_outputs() const { return gated ? n / 2 : n; }
    int outputs_per_panel() const { return gated ? kPanelColumns / 2 : kPanelColumns; }
    int64_t num_panels() const { return ceil_div(num_outputs(), outputs_per_panel()); }
    int64_t padded_k() const { return dtype == DType::kBFloat16 ? ceil_div(k_dim, 2) * 2 : k_dim; }
    int64_t panel_elements() const { return padded_k() * kPanelColumns; }
    int64_t group_elements() const { return num_panels() * panel_elements(); }
    int columns_of(int64_t panel) const {
        const int64_t left = num_outputs() - panel * outputs_per_panel();
        return static_cast<int>(left < outputs_per_panel() ? left : outputs_per_panel());
    }
};

/// Plain weights of one group as the panels see them: one row source, or gate and up.
struct PanelSource {
    const void* first;   ///< gate if gated, else the matrix
    const void* second;  ///< up, or nullptr
    int64_t row_stride;  ///< elements between neighbouring features
    int64_t k_stride;
    bool is_in_caches = false;  ///< as a buffer is that was just read into
};

/// Packs k_begin .. k_begin + k_count - 1 of one panel into `target`; around the caches if
/// `past_caches` and the processor can, then `target` is a multiple of 64 bytes.
void pack_panel(const KernelTable& table, const PanelLayout& layout, const PanelSource& source,
                int64_t panel, int64_t k_begin, int64_t k_count, void* target,
                bool past_caches = false);

}  // namespace moecore::cpu
