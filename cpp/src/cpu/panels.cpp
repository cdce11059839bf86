#include "cpu/panels.hpp"

namespace moecore::cpu {
namespace {

constexpr int kLaneColumns = 16;

/// Sixteen columns of a panel and where they come from, for k = 0.
PackLanes lanes_of(const PanelLayout& layout, const PanelSource& source, int64_t panel,
                   int column) {
    const int64_t element_bytes = static_cast<int64_t>(size_of(layout.dtype));
    const bool is_second = layout.gated && column >= layout.outputs_per_panel();
    const int within = is_second ? column - layout.outputs_per_panel() : column;
    const int64_t row = panel * layout.outputs_per_panel() + within;
    const int left = layout.columns_of(panel) - within;
    const int num_rows = left < 0 ? 0 : (left < kLaneColumns ? left : kLaneColumns);
    const auto* first = static_cast<const char*>(source.first);
    const bool are_pairs = layout.gated && source.row_stride == 2 &&
                           static_cast<const char*>(source.second) == first + element_bytes;
    const auto* base = is_second ? static_cast<const char*>(source.second) : first;
    return {.source = num_rows > 0 ? base + row * source.row_stride * element_bytes : base,
            .row_stride = source.row_stride,
            .k_stride = source.k_stride,
            .num_rows = num_rows,
            .place_in_pair = are_pairs ? (is_second ? 1 : 0) : -1,
            .k_dim = 0,
            .panel = nullptr};
}

}  // namespace

void pack_panel(const KernelTable& table, const PanelLayout& layout, const PanelSource& source,
                int64_t panel, int64_t k_begin, int64_t k_count, void* target, bool past_caches) {
    const bool is_bf16 = layout.dtype == DType::kBFloat16;
    const int64_t element_bytes = static_cast<int64_t>(size_of(layout.dtype));
    const int64_t column_bytes = is_bf16 ? 2 * element_bytes : element_bytes;
    const auto pack = is_bf16 ? table.pack_bf16 : table.pack_f32;
    // Where K is contiguous, memory likes a row to be read to its end. Elsewhere all columns of a
    // few k, since the columns share the panel's lines, and where N is contiguous the source's too.
    const int64_t run = source.is_in_caches ? kPackRunBytes / element_bytes : k_count;
    const int64_t block = source.k_stride == 1 ? run : kPackBlockK;
    for (int64_t k = 0; k < k_count; k += block)
        for (int column = 0; column < kPanelColumns; column += kLaneColumns) {
            PackLanes lanes = lanes_of(layout, source, panel, column);
            if (lanes.num_rows > 0)
                lanes.source = static_cast<const char*>(lanes.source) +
                               (k_begin + k) * source.k_stride * element_bytes;
            lanes.k_dim = k_count - k < block ? k_count - k : block;
            lanes.panel = static_cast<char*>(target) + k * kPanelColumns * element_bytes +
                          column * column_bytes;
            lanes.past_caches = past_caches;
            pack(lanes);
        }
    if (past_caches) table.flush_stores();
}

}  // namespace moecore::cpu
