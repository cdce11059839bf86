#include "cpu/panels.hpp"

namespace moecore::cpu {

void pack_panel(const KernelTable& table, const PanelLayout& layout, const PanelSource& source,
                int64_t panel, int64_t k_begin, int64_t k_count, void* target) {
    constexpr int kLaneColumns = 16;
    const bool is_bf16 = layout.dtype == DType::kBFloat16;
    const int64_t element_bytes = is_bf16 ? 2 : 4;
    const int64_t column_bytes = is_bf16 ? 2 * element_bytes : element_bytes;
    const auto pack = is_bf16 ? table.pack_bf16 : table.pack_f32;
    const int columns = layout.columns_of(panel);
    for (int column = 0; column < kPanelColumns; column += kLaneColumns) {
        const bool is_second = layout.gated && column >= layout.outputs_per_panel();
        const int within = is_second ? column - layout.outputs_per_panel() : column;
        const int64_t row = panel * layout.outputs_per_panel() + within;
        const int left = columns - within;
        const int num_rows = left < 0 ? 0 : (left < kLaneColumns ? left : kLaneColumns);
        const auto* base = static_cast<const char*>(is_second ? source.second : source.first);
        if (num_rows > 0)
            base += (row * source.row_stride + k_begin * source.k_stride) * element_bytes;
        pack({.source = base,
              .row_stride = source.row_stride,
              .k_stride = source.k_stride,
              .num_rows = num_rows,
              .k_dim = k_count,
              .panel = static_cast<char*>(target) + column * column_bytes});
    }
}

}  // namespace moecore::cpu
