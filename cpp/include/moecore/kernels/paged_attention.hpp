#pragma once

#include "moecore/kernels/head_strides.hpp"
#include "moecore/kernels/kv_cache.hpp"

namespace moecore {

/// What the paged_attention kernel takes. Built and checked by ops/paged_attention.cpp.
struct PagedAttentionArgs {
    const void* query;  ///< [T, Hq, D] of the cache's dtype
    void* output;       ///< [T, Hq, D] of the cache's dtype, out
    HeadStrides query_strides, output_strides;
    int64_t num_heads;  ///< Hq, a multiple of Hk
    float scale;
    KvCacheArgs cache;
};

namespace cpu {
void paged_attention(const PagedAttentionArgs& args);
}

}  // namespace moecore
