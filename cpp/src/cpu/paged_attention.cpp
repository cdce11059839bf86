#include "moecore/kernels/paged_attention.hpp"

#include <cstring>
#include <vector>

#include "cpu/kv_panels.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {
namespace {

/// Rows that pass together over a sequence's blocks, so that a block is read from memory once for
/// all of them and their sums stay in the first levels of cache. A multiple of kMaxTileRows.
constexpr int64_t kMaxItemRows = 48;

/// Blocks whose scores are taken before their values are read, for items of one tile: keys and
/// values then arrive in long runs. More rows read a block from the nearest cache anyway.
constexpr int64_t kBlocksAhead = 8;

constexpr int kMaxValuePanels = static_cast<int>(kMaxHeadDim) / kPanelColumns;

constexpr float kLog2e = 1.44269504088896341f;

/// Below this many products of one row with one block, threads cost more than they bring.
constexpr int64_t kRowBlocksPerRange = 16;

/// Rows begin .. begin + count - 1 of a segment's tokens times the query heads of one kv head.
struct Item {
    KvSegment segment;
    int64_t kv_head;
    int64_t begin;
    int64_t count;
    int64_t num_blocks() const { return segment.position / kKvBlockSize + 1; }
};

/// One thread's scratch.
struct Scratch {
    const char* queries[kMaxItemRows];  ///< each row's query
    char* targets[kMaxItemRows];        ///< each row's output
    int last_keys[kMaxItemRows];        ///< keys of its last block that the row sees
    alignas(64) float scores[kBlocksAhead][kMaxTileRows * kPanelColumns];
    alignas(64) float weights[kMaxTileRows * kPanelColumns];  ///< for bfloat16 the first half
    alignas(64) float output[kMaxValuePanels][kMaxItemRows * kPanelColumns];
    alignas(64) float sums[kMaxItemRows * 16];
    alignas(64) float maxima[kMaxItemRows];
    alignas(64) float wide_panel[kKvBlockSize * kPanelColumns];
    alignas(64) float cleared_block[kKvBlockSize * kMaxHeadDim];
};

/// One kv head's 64 values.
struct ValueBlock {
    const char* values;
    const void* last_panel;  ///< of the values, 64 columns wide
    bool is_first, is_last;
};

class Attention {
public:
    explicit Attention(const PagedAttentionArgs& args)
        : args_(args),
          table_(kernels()),
          panels_(args.cache),
          group_(args.num_heads / args.cache.num_kv_heads) {}

    void run() const {
        int64_t row_blocks = 0;
        const std::vector<Item> items = cut_rows(row_blocks);
        if (items.empty()) return;
        const auto count = static_cast<int64_t>(items.size());
        const int64_t grain =
            std::clamp<int64_t>(kRowBlocksPerRange * count / row_blocks, 1, count);
        parallel_ranges(count, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) attend(items[static_cast<size_t>(i)]);
        });
    }

private:
    /// Longest first, so that no thread begins a long one when the others are done.
    std::vector<Item> cut_rows(int64_t& row_blocks) const {
        std::vector<KvSegment> segments;
        segments.reserve(static_cast<size_t>(args_.cache.num_sequences));
        for_each_segment(args_.cache,
                         [&](const KvSegment& segment) { segments.push_back(segment); });
        std::stable_sort(
            segments.begin(), segments.end(),
            [](const KvSegment& a, const KvSegment& b) { return a.position > b.position; });
        const int64_t num_units = static_cast<int64_t>(segments.size()) * args_.cache.num_kv_heads;
        std::vector<Item> items;
        items.reserve(static_cast<size_t>(num_units));
        for (const KvSegment& segment : segments) {
            const int64_t rows = segment.num_tokens * group_;
            int64_t parts = ceil_div(rows, kMaxItemRows);
            // Few heads and sequences: threads share a kv head's rows.
            if (num_units < num_threads())
                parts = std::max(parts, std::min(rows, ceil_div(num_threads(), num_units)));
            int64_t step = ceil_div(rows, parts);
            if (step > kMaxTileRows) step = ceil_div(step, kMaxTileRows) * kMaxTileRows;
            for (int64_t head = 0; head < args_.cache.num_kv_heads; ++head)
                for (int64_t row = 0; row < rows; row += step)
                    items.push_back({segment, head, row, std::min(step, rows - row)});
            row_blocks += rows * args_.cache.num_kv_heads * (segment.position / kKvBlockSize + 1);
        }
        return items;
    }

    void attend(const Item& item) const {
        if (attend(item, false)) return;
        // Something is not finite. A row must not see it through weights of 0 if it lies after the
        // row's own position: row by row, on values cleared from there on.
        for (int64_t row = 0; row < item.count; ++row)
            attend({item.segment, item.kv_head, item.begin + row, 1}, true);
    }

    /// Returns whether every output is finite.
    bool attend(const Item& item, bool clear_later_values) const {
        static thread_local Scratch scratch;
        const int64_t num_blocks = item.num_blocks();
        locate_rows(item, scratch);
        const int last_panel = panels_.num_value_panels() - 1;
        const bool is_one_tile = item.count <= kMaxTileRows;
        for (int64_t b = 0; b < num_blocks; ++b) {
            const int64_t position = b * kKvBlockSize;
            if (is_one_tile && b % kBlocksAhead == 0)
                for (int64_t i = b; i < std::min(num_blocks, b + kBlocksAhead); ++i)
                    score(item, i, 0, static_cast<int>(item.count), scratch.scores[i - b], scratch);
            ValueBlock block{
                .values = panels_.value_block(item.segment.sequence, position, item.kv_head),
                .is_first = b == 0,
                .is_last = b == num_blocks - 1,
            };
            if (block.is_last && clear_later_values)
                block.values = clear_values(block.values, scratch.last_keys[0], scratch);
            block.last_panel = widened(block.values + last_panel * panels_.value_panel_bytes(),
                                       last_panel, scratch);
            for (int64_t row = 0; row < item.count;) {
                const int rows = tile_rows(item.count - row);
                float* scores = scratch.scores[is_one_tile ? b % kBlocksAhead : 0];
                if (!is_one_tile) score(item, b, row, rows, scores, scratch);
                add_block(block, row, rows, scores, scratch);
                row += rows;
            }
        }
        return store(item.count, scratch);
    }

    /// Full tiles, then what is left in two even ones: 8 rows as 4 + 4, not 6 + 2.
    static int tile_rows(int64_t left) {
        if (left <= kMaxTileRows) return static_cast<int>(left);
        return left >= 2 * kMaxTileRows ? kMaxTileRows : static_cast<int>(ceil_div(left, 2));
    }

    void locate_rows(const Item& item, Scratch& scratch) const {
        int64_t token = item.begin / group_, head = item.begin % group_;
        for (int64_t row = 0; row < item.count; ++row) {
            const auto offset = [&](const HeadStrides& strides) {
                return ((item.segment.first_token + token) * strides.token +
                        (item.kv_head * group_ + head) * strides.head) *
                       panels_.element_bytes;
            };
            scratch.queries[row] =
                static_cast<const char*>(args_.query) + offset(args_.query_strides);
            scratch.targets[row] = static_cast<char*>(args_.output) + offset(args_.output_strides);
            scratch.last_keys[row] =
                static_cast<int>((item.segment.position + token) % kKvBlockSize) + 1;
            if (++head < group_) continue;
            head = 0;
            ++token;
        }
    }

    auto product_of(int rows) const {
        return (panels_.element_bytes == 2 ? table_.tile_bf16 : table_.tile_f32)[rows];
    }

    /// Products of queries row .. row + rows - 1 with the 64 keys of block `b`.
    void score(const Item& item, int64_t b, int64_t row, int rows, float* scores,
               const Scratch& scratch) const {
        GemmTile products{
            .rows = {},
            .panel = panels_.key_block(item.segment.sequence, b * kKvBlockSize, item.kv_head),
            .k_dim = args_.cache.head_dim,
            .sums = scores,
            .accumulate = false};
        for (int m = 0; m < rows; ++m) products.rows[m] = scratch.queries[row + m];
        product_of(rows)(products);
    }

    void add_block(const ValueBlock& block, int64_t row, int rows, float* scores,
                   Scratch& scratch) const {
        // 1. The weights of the scores, and what the new maximum does to the sums so far.
        SoftmaxTile softmax{.scores = scores,
                            .weights = scratch.weights,
                            .maxima = scratch.maxima + row,
                            .sums = scratch.sums + row * 16,
                            .output = scratch.output[0] + row * kPanelColumns,
                            .panel_stride = kMaxItemRows * kPanelColumns,
                            .num_panels = panels_.num_value_panels(),
                            .num_rows = rows,
                            .num_keys = {},
                            .is_first = block.is_first,
                            .scale = args_.scale * kLog2e,
                            .dtype = args_.cache.dtype};
        for (int m = 0; m < rows; ++m)
            softmax.num_keys[m] = block.is_last ? scratch.last_keys[row + m] : kKvBlockSize;
        table_.softmax(softmax);

        // 2. Weights times values. Pairs of positions, so an odd number of keys rounds up: the
        //    weight there is 0.
        GemmTile products{.rows = {},
                          .panel = nullptr,
                          .k_dim = ceil_div(softmax.num_keys[rows - 1], 2) * 2,
                          .sums = nullptr,
                          .accumulate = !block.is_first};
        for (int m = 0; m < rows; ++m)
            products.rows[m] = reinterpret_cast<const char*>(scratch.weights) +
                               m * kPanelColumns * panels_.element_bytes;
        for (int panel = 0; panel < softmax.num_panels; ++panel) {
            products.panel = panel == softmax.num_panels - 1
                                 ? block.last_panel
                                 : block.values + panel * panels_.value_panel_bytes();
            products.sums = scratch.output[panel] + row * kPanelColumns;
            product_of(rows)(products);
        }
    }

    bool store(int64_t num_rows, const Scratch& scratch) const {
        bool all_finite = true;
        for (int64_t row = 0; row < num_rows; ++row)
            all_finite &= table_.attention_row({.output = scratch.output[0] + row * kPanelColumns,
                                                .panel_stride = kMaxItemRows * kPanelColumns,
                                                .sums = scratch.sums + row * 16,
                                                .head_dim = args_.cache.head_dim,
                                                .target = scratch.targets[row],
                                                .dtype = args_.cache.dtype});
        return all_finite;
    }

    /// The panel itself if it has 64 columns, else a copy of it with columns of 0.
    const void* widened(const char* panel, int index, Scratch& scratch) const {
        const int columns = panels_.value_columns(index);
        if (columns == kPanelColumns) return panel;
        const int64_t lines = kKvBlockSize * panels_.element_bytes / 4;
        const auto line_bytes = static_cast<size_t>(columns) * 4;
        char* target = reinterpret_cast<char*>(scratch.wide_panel);
        for (int64_t line = 0; line < lines; ++line, target += kPanelColumns * 4) {
            std::memcpy(target, panel + line * columns * 4, line_bytes);
            std::memset(target + line_bytes, 0, kPanelColumns * 4 - line_bytes);
        }
        return scratch.wide_panel;
    }

    /// A copy of a block's values, with 0 from position `num_keys` on.
    const char* clear_values(const char* block, int num_keys, Scratch& scratch) const {
        char* target = reinterpret_cast<char*>(scratch.cleared_block);
        std::memcpy(target, block, static_cast<size_t>(panels_.block_bytes()));
        const int64_t per_word = 4 / panels_.element_bytes;
        for (int panel = 0; panel < panels_.num_value_panels(); ++panel) {
            const int columns = panels_.value_columns(panel);
            auto* words = reinterpret_cast<uint32_t*>(target + panel * panels_.value_panel_bytes());
            int64_t line = num_keys / per_word;
            if (num_keys % per_word != 0) {
                for (int c = 0; c < columns; ++c) words[line * columns + c] &= 0xffffu;
                ++line;
            }
            const int64_t lines = kKvBlockSize / per_word;
            std::memset(words + line * columns, 0,
                        static_cast<size_t>((lines - line) * columns) * 4);
        }
        return target;
    }

    const PagedAttentionArgs& args_;
    const KernelTable& table_;
    KvPanels panels_;
    int64_t group_;
};

}  // namespace

void paged_attention(const PagedAttentionArgs& args) { Attention(args).run(); }

}  // namespace moecore::cpu
