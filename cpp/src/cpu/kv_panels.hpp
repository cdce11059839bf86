#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernel_table.hpp"
#include "cpu/panels.hpp"
#include "moecore/kernels/kv_cache.hpp"
#include "moecore/kv_cache.hpp"

namespace moecore::cpu {

static_assert(kKvBlockSize == kPanelColumns, "a block's keys are one panel");

/// Where keys and values lie in a cache: see moecore/kv_cache.hpp.
struct KvPanels {
    explicit KvPanels(const KvCacheArgs& args)
        : args(args), element_bytes(static_cast<int64_t>(size_of(args.dtype))) {}

    int64_t block_bytes() const { return kKvBlockSize * args.head_dim * element_bytes; }
    int64_t row_words() const { return args.head_dim * element_bytes / 4; }
    int num_value_panels() const {
        return static_cast<int>(ceil_div(args.head_dim, kPanelColumns));
    }
    int value_columns(int panel) const {
        return static_cast<int>(
            std::min<int64_t>(kPanelColumns, args.head_dim - panel * kPanelColumns));
    }
    int64_t value_panel_bytes() const { return kKvBlockSize * kPanelColumns * element_bytes; }

    /// The block of one head that holds `position` of a sequence.
    char* key_block(int64_t sequence, int64_t position, int64_t head) const {
        return static_cast<char*>(args.key) + block_offset(sequence, position, head);
    }
    char* value_block(int64_t sequence, int64_t position, int64_t head) const {
        return static_cast<char*>(args.value) + block_offset(sequence, position, head);
    }

    const KvCacheArgs& args;
    int64_t element_bytes;

private:
    int64_t block_offset(int64_t sequence, int64_t position, int64_t head) const {
        const int32_t* table = args.block_tables + sequence * args.block_table_stride;
        return (head * args.num_blocks + table[position / kKvBlockSize]) * block_bytes();
    }
};

/// Tokens of one sequence whose positions lie in one block.
struct KvSegment {
    int64_t sequence;
    int64_t first_token;
    int64_t position;  ///< of the first token
    int64_t num_tokens;
};

/// Calls fn(segment) for all tokens, in ascending order.
template <typename Fn>
void for_each_segment(const KvCacheArgs& args, Fn&& fn) {
    for (int64_t s = 0; s < args.num_sequences; ++s) {
        int64_t token = args.query_offsets[s];
        const int64_t end = args.query_offsets[s + 1];
        int64_t position = args.context_lens[s] - (end - token);
        while (token < end) {
            const int64_t count =
                std::min<int64_t>(end - token, kKvBlockSize - position % kKvBlockSize);
            fn(KvSegment{s, token, position, count});
            token += count;
            position += count;
        }
    }
}

}  // namespace moecore::cpu
