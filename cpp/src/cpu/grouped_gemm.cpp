#include "moecore/kernels/grouped_gemm.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/panels.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {
namespace {

/// Rows that one unit of work multiplies with one panel: their inputs should stay in the second
/// level cache beside the panel while the panel is read once for every tile of them.
constexpr int64_t kInputBytesPerUnit = 512 * 1024;
constexpr int64_t kMaxRowsPerUnit = 240;  ///< a multiple of kMaxTileRows
/// The same for a matrix unit, which needs more rows for each time it reads a panel.
constexpr int64_t kMatrixInputBytes = 1024 * 1024;
constexpr int64_t kMinMatrixRows = 64;
constexpr int64_t kMatrixRows = 16;  ///< its tiles' rows
static_assert(kMaxRowsPerUnit % kMatrixRows == 0, "sums of the rows after the last have a place");

/// Plain weights are packed this much of K at a time, into a buffer that stays in cache.
constexpr int64_t kPackedK = 512;

/// A matrix unit's work is handed out in this many ranges a thread: enough that threads of
/// different speed end together, and few, since each range brings its rows into place. Other work
/// is handed out panel by panel: of a decode's few panels the last one is what threads wait for.
constexpr int64_t kRangesPerThread = 32;

/// Rows begin .. begin + count - 1 of one group, for every panel.
struct RowBlock {
    int group;
    int64_t begin;
    int64_t count;
};

/// A block's inputs for a matrix unit.
struct EvenRows {
    const uint16_t* first;
    int64_t stride;  ///< elements between rows
};

std::vector<RowBlock> cut_rows(const GroupedGemmArgs& args, int64_t rows_per_block) {
    std::vector<RowBlock> blocks;
    blocks.reserve(static_cast<size_t>(std::min<int64_t>(args.num_groups, args.num_rows) +
                                       args.num_rows / rows_per_block));
    for (int g = 0; g < args.num_groups; ++g) {
        const int64_t begin = args.expert_offsets ? args.expert_offsets[g] : 0;
        const int64_t end = args.expert_offsets ? args.expert_offsets[g + 1] : args.num_rows;
        for (int64_t row = begin; row < end; row += rows_per_block)
            blocks.push_back({g, row, std::min(rows_per_block, end - row)});
    }
    return blocks;
}

PanelSource panel_source(const GroupedGemmArgs& args, const PanelLayout& layout, int group) {
    const char* base = static_cast<const char*>(args.weights) +
                       group * args.group_stride * static_cast<int64_t>(size_of(args.dtype));
    if (!layout.gated) return {base, nullptr, args.n_stride, args.k_stride};
    const bool interleaved = args.config.gate_order == GateOrder::kInterleaved;
    const int64_t up = interleaved ? args.n_stride : layout.num_outputs() * args.n_stride;
    return {base, base + up * static_cast<int64_t>(size_of(args.dtype)),
            interleaved ? 2 * args.n_stride : args.n_stride, args.k_stride};
}

/// The bias of one panel's 64 columns, as float32, gates before ups.
void load_bias(const GroupedGemmArgs& args, const PanelLayout& layout, int group, int64_t panel,
               float* bias) {
    const bool interleaved = args.config.gate_order == GateOrder::kInterleaved;
    const int columns = layout.columns_of(panel);
    std::fill(bias, bias + kPanelColumns, 0.0f);
    const auto element = [&](int64_t feature) {
        const int64_t index = group * args.bias_stride + feature;
        if (args.bias_dtype == DType::kFloat32) return static_cast<const float*>(args.bias)[index];
        const uint32_t bits = uint32_t{static_cast<const uint16_t*>(args.bias)[index]} << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    };
    for (int c = 0; c < columns; ++c) {
        const int64_t feature = panel * layout.outputs_per_panel() + c;
        if (!layout.gated) {
            bias[c] = element(feature);
        } else {
            bias[c] = element(interleaved ? 2 * feature : feature);
            bias[c + kPanelColumns / 2] =
                element(interleaved ? 2 * feature + 1 : layout.num_outputs() + feature);
        }
    }
}

/// One thread's scratch.
struct Scratch {
    alignas(64) float sums[kMaxRowsPerUnit * kPanelColumns];
    alignas(64) float bias[kPanelColumns];
    alignas(64) float panel[kPackedK * kPanelColumns];  ///< for bfloat16 the first half is used
};

class Problem {
public:
    explicit Problem(const GroupedGemmArgs& args)
        : args_(args),
          table_(kernels()),
          layout_{args.n, args.k_dim, is_gated(args.config.activation), args.dtype},
          element_bytes_(static_cast<int64_t>(size_of(args.dtype))) {
        const int64_t row_bytes = args.k_dim * element_bytes_;
        rows_per_block_ =
            has_matrix_unit()
                ? std::clamp(kMatrixInputBytes / row_bytes / kMatrixRows * kMatrixRows,
                             kMinMatrixRows, kMaxRowsPerUnit)
                : std::clamp<int64_t>(kInputBytesPerUnit / row_bytes / kMaxTileRows * kMaxTileRows,
                                      4 * kMaxTileRows, kMaxRowsPerUnit);
    }

    void run() const {
        const std::vector<RowBlock> blocks = cut_rows(args_, rows_per_block_);
        const int64_t num_panels = layout_.num_panels();
        const int64_t num_units = static_cast<int64_t>(blocks.size()) * num_panels;
        const int64_t num_ranges = kRangesPerThread * num_threads();
        const int64_t grain = has_matrix_unit() ? std::max<int64_t>(1, num_units / num_ranges) : 1;
        parallel_ranges(num_units, grain, [&](int64_t begin, int64_t end) {
            EvenRows rows{};
            for (int64_t unit = begin; unit < end; ++unit) {
                const RowBlock& block = blocks[static_cast<size_t>(unit / num_panels)];
                const int64_t panel = unit % num_panels;
                if (!has_matrix_unit()) {
                    multiply(block, panel);
                    continue;
                }
                if (unit == begin || panel == 0) rows = even_rows(block);
                multiply(block, panel, rows);
            }
        });
    }

private:
    bool has_matrix_unit() const {
        return args_.dtype == DType::kBFloat16 && table_.block_bf16 != nullptr;
    }

    /// The block's rows where they are, or a copy of them whose rows begin in all sets of the first
    /// level cache. Rows that lie a multiple of 1 KB apart would displace each other there.
    EvenRows even_rows(const RowBlock& block) const {
        const int64_t read_rows = ceil_div(block.count, kMatrixRows) * kMatrixRows;
        const bool is_even = args_.sorted_slots == nullptr || block.count == 1;
        const bool is_spread = args_.input_stride * element_bytes_ % 1024 != 0;
        const bool has_more_rows = block.begin + read_rows <= args_.num_rows;
        if (is_even && (block.count <= kMatrixRows || (is_spread && has_more_rows)))
            return {static_cast<const uint16_t*>(input_row(block.begin)), args_.input_stride};
        constexpr int64_t kLineElements = 32;
        const int64_t stride = (ceil_div(args_.k_dim, kLineElements) | 1) * kLineElements;
        static thread_local std::vector<uint16_t> copy;
        copy.resize(std::max(copy.size(), static_cast<size_t>(read_rows * stride)));
        for (int64_t row = 0; row < block.count; ++row)
            std::memcpy(copy.data() + row * stride, input_row(block.begin + row),
                        static_cast<size_t>(args_.k_dim * element_bytes_));
        return {copy.data(), stride};
    }

    void multiply(const RowBlock& block, int64_t panel, const EvenRows& rows) const {
        static thread_local Scratch scratch;
        GemmBlock product{.rows = rows.first,
                          .row_stride = rows.stride,
                          .num_rows = block.count,
                          .panel = nullptr,
                          .k_dim = args_.k_dim,
                          .sums = scratch.sums,
                          .accumulate = false,
                          .is_streamed = args_.is_packed};
        if (args_.is_packed) {
            product.panel = static_cast<const uint16_t*>(packed_panel(block.group, panel));
            table_.block_bf16(product);
        } else {
            const PanelSource source = panel_source(args_, layout_, block.group);
            product.panel = reinterpret_cast<const uint16_t*>(scratch.panel);
            for (int64_t k = 0; k < args_.k_dim; k += kPackedK) {
                product.k_dim = std::min(kPackedK, args_.k_dim - k);
                pack_panel(table_, layout_, source, panel, k, product.k_dim, scratch.panel);
                product.rows = rows.first + k;
                product.accumulate = k > 0;
                table_.block_bf16(product);
            }
        }
        if (args_.bias != nullptr) load_bias(args_, layout_, block.group, panel, scratch.bias);
        store(block.begin, static_cast<int>(block.count), panel, scratch.sums, scratch.bias);
    }

    const void* packed_panel(int group, int64_t panel) const {
        return static_cast<const char*>(args_.weights) +
               (group * layout_.group_elements() + panel * layout_.panel_elements()) *
                   element_bytes_;
    }

    const void* input_row(int64_t row) const {
        const int64_t source =
            args_.sorted_slots ? args_.sorted_slots[row] / args_.slots_per_token : row;
        return static_cast<const char*>(args_.input) + source * args_.input_stride * element_bytes_;
    }

    void multiply(const RowBlock& block, int64_t panel) const {
        static thread_local Scratch scratch;
        if (args_.bias != nullptr) load_bias(args_, layout_, block.group, panel, scratch.bias);
        // Of a router of few experts a half is padding, which need not come from memory.
        const bool is_half = !layout_.gated && layout_.columns_of(panel) <= kPanelColumns / 2;
        const int columns = is_half ? kPanelColumns / 2 : kPanelColumns;
        if (args_.is_packed) {
            const void* packed = packed_panel(block.group, panel);
            for_each_tile(block, [&](int64_t first, int rows) {
                multiply_tile(block.begin + first, rows, columns, packed, 0, args_.k_dim,
                              scratch.sums);
                store(block.begin + first, rows, panel, scratch.sums, scratch.bias);
            });
            return;
        }
        const PanelSource source = panel_source(args_, layout_, block.group);
        for (int64_t k = 0; k < args_.k_dim; k += kPackedK) {
            const int64_t k_count = std::min(kPackedK, args_.k_dim - k);
            pack_panel(table_, layout_, source, panel, k, k_count, scratch.panel);
            for_each_tile(block, [&](int64_t first, int rows) {
                multiply_tile(block.begin + first, rows, columns, scratch.panel, k, k_count,
                              scratch.sums + first * kPanelColumns);
            });
        }
        for_each_tile(block, [&](int64_t first, int rows) {
            store(block.begin + first, rows, panel, scratch.sums + first * kPanelColumns,
                  scratch.bias);
        });
    }

    template <typename Fn>
    void for_each_tile(const RowBlock& block, Fn&& fn) const {
        // Full tiles, then what is left in two even ones: 7 rows as 4 + 3, not 6 + 1.
        int64_t row = 0;
        while (row < block.count) {
            const int64_t left = block.count - row;
            const int64_t rows = left >= 2 * kMaxTileRows || left <= kMaxTileRows
                                     ? std::min<int64_t>(left, kMaxTileRows)
                                     : ceil_div(left, 2);
            fn(row, static_cast<int>(rows));
            row += rows;
        }
    }

    void multiply_tile(int64_t first_row, int num_rows, int num_columns, const void* panel,
                       int64_t k_begin, int64_t k_count, float* sums) const {
        GemmTile tile{.rows = {},
                      .panel = panel,
                      .k_dim = k_count,
                      .sums = sums,
                      .accumulate = k_begin > 0,
                      .num_columns = num_columns};
        for (int m = 0; m < num_rows; ++m)
            tile.rows[m] =
                static_cast<const char*>(input_row(first_row + m)) + k_begin * element_bytes_;
        (args_.dtype == DType::kBFloat16 ? table_.tile_bf16 : table_.tile_f32)[num_rows](tile);
    }

    void store(int64_t first_row, int num_rows, int64_t panel, const float* sums,
               const float* bias) const {
        const auto element_bytes = static_cast<int64_t>(size_of(args_.output_dtype));
        const int64_t column_bytes = panel * layout_.outputs_per_panel() * element_bytes;
        EpilogueTile tile{.sums = sums,
                          .bias = args_.bias ? bias : nullptr,
                          .output = nullptr,
                          .output_stride = args_.output_stride,
                          .num_rows = num_rows,
                          .num_columns = layout_.columns_of(panel),
                          .output_dtype = args_.output_dtype,
                          .config = args_.config};
        if (args_.row_addresses == nullptr) {
            tile.output = static_cast<char*>(args_.output) +
                          first_row * args_.output_stride * element_bytes + column_bytes;
            return table_.epilogue(tile);
        }
        tile.num_rows = 1;
        for (int row = 0; row < num_rows; ++row) {
            tile.output =
                reinterpret_cast<char*>(args_.row_addresses[first_row + row] + column_bytes);
            table_.epilogue(tile);
            tile.sums += kPanelColumns;
        }
    }

    const GroupedGemmArgs& args_;
    const KernelTable& table_;
    PanelLayout layout_;
    int64_t element_bytes_;
    int64_t rows_per_block_;
};

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args) { Problem(args).run(); }

}  // namespace moecore::cpu
