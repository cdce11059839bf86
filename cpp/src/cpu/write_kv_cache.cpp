#include "moecore/kernels/write_kv_cache.hpp"

#include <cstring>
#include <vector>

#include "cpu/kv_panels.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {
namespace {

constexpr int kPackColumns = 16;  ///< tokens that one call of the table's pack takes

class Writer {
public:
    explicit Writer(const WriteKvCacheArgs& args)
        : args_(args), table_(kernels()), panels_(args.cache) {}

    void run() const {
        constexpr int64_t kElementsPerRange = 16 * 1024;
        std::vector<KvSegment> segments;
        segments.reserve(static_cast<size_t>(args_.cache.num_sequences));
        for_each_segment(args_.cache,
                         [&](const KvSegment& segment) { segments.push_back(segment); });
        if (segments.empty()) return;
        const int64_t num_heads = args_.cache.num_kv_heads;
        const auto num_segments = static_cast<int64_t>(segments.size());
        const int64_t num_tokens = args_.cache.query_offsets[args_.cache.num_sequences];
        const int64_t elements = ceil_div(num_tokens, num_segments) * args_.cache.head_dim;
        const int64_t grain = std::max<int64_t>(1, kElementsPerRange / elements);
        parallel_ranges(num_segments * num_heads, grain, [&](int64_t begin, int64_t end) {
            for (int64_t unit = begin; unit < end; ++unit)
                write(segments[static_cast<size_t>(unit / num_heads)], unit % num_heads);
        });
    }

private:
    void write(const KvSegment& segment, int64_t head) const {
        char* keys = panels_.key_block(segment.sequence, segment.position, head);
        char* values = panels_.value_block(segment.sequence, segment.position, head);
        const bool is_fresh = segment.position % kKvBlockSize == 0;
        // Weights of 0 multiply what lies after a row's position: that must not be NaN.
        if (is_fresh && segment.num_tokens < kKvBlockSize) {
            std::memset(keys, 0, static_cast<size_t>(panels_.block_bytes()));
            std::memset(values, 0, static_cast<size_t>(panels_.block_bytes()));
        }
        write_keys(segment, source(args_.key, args_.key_strides, segment, head), keys);
        const char* rows = source(args_.value, args_.value_strides, segment, head);
        if (panels_.element_bytes == 2)
            write_bf16_values(segment, rows, values);
        else
            write_f32_values(segment, rows, values);
    }

    const char* source(const void* base, const HeadStrides& strides, const KvSegment& segment,
                       int64_t head) const {
        return static_cast<const char*>(base) +
               (segment.first_token * strides.token + head * strides.head) * panels_.element_bytes;
    }

    void write_keys(const KvSegment& segment, const char* rows, char* panel) const {
        const int64_t stride = args_.key_strides.token * panels_.element_bytes;
        int64_t column = segment.position % kKvBlockSize;
        const int64_t end = column + segment.num_tokens;
        while (column < end) {
            if (column % kPackColumns == 0 && end - column >= kPackColumns) {
                const auto pack = panels_.element_bytes == 2 ? table_.pack_bf16 : table_.pack_f32;
                pack({.source = rows,
                      .row_stride = args_.key_strides.token,
                      .k_stride = 1,
                      .num_rows = kPackColumns,
                      .k_dim = args_.cache.head_dim,
                      .panel = panel + column * 4});
                rows += kPackColumns * stride;
                column += kPackColumns;
                continue;
            }
            for (int64_t word = 0; word < panels_.row_words(); ++word)
                std::memcpy(panel + (word * kPanelColumns + column) * 4, rows + word * 4, 4);
            rows += stride;
            ++column;
        }
    }

    /// A word holds one column of two neighbouring positions, the even one in its lower half.
    void write_bf16_values(const KvSegment& segment, const char* rows, char* block) const {
        const int64_t stride = args_.value_strides.token * 2;
        int64_t position = segment.position % kKvBlockSize;
        const int64_t end = position + segment.num_tokens;
        while (position < end) {
            const bool both = position % 2 == 0 && position + 1 < end;
            for (int panel = 0; panel < panels_.num_value_panels(); ++panel) {
                const int columns = panels_.value_columns(panel);
                const auto* row = reinterpret_cast<const uint16_t*>(rows) + panel * kPanelColumns;
                auto* words =
                    reinterpret_cast<uint32_t*>(block + panel * panels_.value_panel_bytes()) +
                    position / 2 * columns;
                if (both) {
                    const auto* next = row + args_.value_strides.token;
                    for (int c = 0; c < columns; ++c)
                        words[c] = uint32_t{row[c]} | uint32_t{next[c]} << 16;
                } else if (position % 2 == 0) {
                    for (int c = 0; c < columns; ++c) words[c] = (words[c] & 0xffff0000u) | row[c];
                } else {
                    for (int c = 0; c < columns; ++c)
                        words[c] = (words[c] & 0xffffu) | uint32_t{row[c]} << 16;
                }
            }
            rows += both ? 2 * stride : stride;
            position += both ? 2 : 1;
        }
    }

    void write_f32_values(const KvSegment& segment, const char* rows, char* block) const {
        const int64_t begin = segment.position % kKvBlockSize;
        for (int64_t i = 0; i < segment.num_tokens; ++i) {
            const char* row = rows + i * args_.value_strides.token * 4;
            for (int panel = 0; panel < panels_.num_value_panels(); ++panel) {
                const int64_t row_bytes = panels_.value_columns(panel) * int64_t{4};
                std::memcpy(block + panel * panels_.value_panel_bytes() + (begin + i) * row_bytes,
                            row + panel * kPanelColumns * 4, static_cast<size_t>(row_bytes));
            }
        }
    }

    const WriteKvCacheArgs& args_;
    const KernelTable& table_;
    KvPanels panels_;
};

}  // namespace

void write_kv_cache(const WriteKvCacheArgs& args) { Writer(args).run(); }

}  // namespace moecore::cpu
