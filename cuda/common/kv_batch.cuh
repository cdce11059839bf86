#pragma once

// Who owns a token, and where its sequence's blocks lie. The host has not seen these tensors: what
// they place outside the cache is -1 here.

#include <cstdint>

#include "moecore/kernels/kv_cache.hpp"
#include "moecore/kv_cache.hpp"

namespace moecore::cuda {

/// The sequence that owns `token`, -1 if none does.
__device__ inline int64_t sequence_of(const KvCacheArgs& cache, int64_t token) {
    // In a pass of decodes every sequence has one token.
    int64_t low = 0, high = cache.num_sequences;
    if (token < high && cache.query_offsets[token] == token &&
        cache.query_offsets[token + 1] == token + 1)
        return token;
    while (low < high) {  // the first sequence that ends after the token
        const int64_t middle = (low + high) / 2;
        if (cache.query_offsets[middle + 1] > token)
            high = middle;
        else
            low = middle + 1;
    }
    return low < cache.num_sequences && cache.query_offsets[low] <= token ? low : -1;
}

/// Where block `index` of a sequence lies in the cache, -1 if nowhere.
__device__ inline int64_t cache_block(const KvCacheArgs& cache, int64_t sequence, int64_t index) {
    if (index >= cache.block_table_width) return -1;
    const int64_t block = cache.block_tables[sequence * cache.block_table_stride + index];
    return block >= 0 && block < cache.num_blocks ? block : -1;
}

/// Where the keys and values of `token` belong, as a row of each head of the cache; -1 if nowhere.
__device__ inline int64_t cache_row(const KvCacheArgs& cache, int64_t token) {
    const int64_t sequence = sequence_of(cache, token);
    if (sequence < 0) return -1;
    const int64_t position =
        cache.context_lens[sequence] - (cache.query_offsets[sequence + 1] - token);
    if (position < 0) return -1;
    const int64_t block = cache_block(cache, sequence, position / kKvBlockSize);
    return block < 0 ? -1 : block * kKvBlockSize + position % kKvBlockSize;
}

}  // namespace moecore::cuda
