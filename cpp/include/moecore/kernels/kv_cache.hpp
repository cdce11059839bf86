#pragma once

#include <cstdint>

#include "moecore/dtype.hpp"

namespace moecore {

/// A checked KvCache and SequenceBatch. S sequences, B blocks a row of the table.
struct KvCacheArgs {
    void* key;
    void* value;
    int64_t num_kv_heads;          ///< Hk
    int64_t num_blocks;            ///< of each head
    int64_t head_dim;              ///< D
    const int32_t* query_offsets;  ///< [S + 1]
    const int32_t* context_lens;   ///< [S]
    const int32_t* block_tables;   ///< [S, B]
    int64_t block_table_stride;
    int64_t block_table_width;  ///< B
    int64_t num_sequences;      ///< S >= 0
    DType dtype;                ///< of key and value
    bool is_settled;            ///< as in SequenceBatch
};

}  // namespace moecore
