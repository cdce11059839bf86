#pragma once

#include "moecore/kernels/head_strides.hpp"
#include "moecore/kernels/kv_cache.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// What the paged_attention kernel takes. Built and checked by ops/paged_attention.cpp.
struct PagedAttentionArgs {
    const void* query;  ///< [T, Hq, D] of the cache's dtype
    void* output;       ///< [T, Hq, D] of the cache's dtype, out
    HeadStrides query_strides, output_strides;
    int64_t num_tokens;  ///< T >= 0
    int64_t num_heads;   ///< Hq, a multiple of Hk
    float scale;
    KvCacheArgs cache;
};

namespace cpu {
void paged_attention(const PagedAttentionArgs& args);
}
namespace cuda {
/// bfloat16, D a multiple of 16, every row at a multiple of 16 bytes. The batch is on the device,
/// where no check has seen it: blocks outside the cache or the table read as zeros, and tokens of
/// no sequence are not written.
void paged_attention(const PagedAttentionArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
