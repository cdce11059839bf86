#pragma once

#include "moecore/kernels/head_strides.hpp"
#include "moecore/kernels/kv_cache.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// What the write_kv_cache kernel takes. Built and checked by ops/write_kv_cache.cpp.
struct WriteKvCacheArgs {
    const void* key;    ///< [T, Hk, D] of the cache's dtype
    const void* value;  ///< [T, Hk, D] of the cache's dtype
    HeadStrides key_strides, value_strides;
    int64_t num_tokens;  ///< T >= 0
    KvCacheArgs cache;
};

namespace cpu {
void write_kv_cache(const WriteKvCacheArgs& args);
}
namespace cuda {
/// As paged_attention: what the batch places outside the cache is not written.
void write_kv_cache(const WriteKvCacheArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
