#pragma once

#include "moecore/kernels/head_strides.hpp"
#include "moecore/kernels/kv_cache.hpp"

namespace moecore {

/// What the write_kv_cache kernel takes. Built and checked by ops/write_kv_cache.cpp.
struct WriteKvCacheArgs {
    const void* key;    ///< [T, Hk, D] of the cache's dtype
    const void* value;  ///< [T, Hk, D] of the cache's dtype
    HeadStrides key_strides, value_strides;
    KvCacheArgs cache;
};

namespace cpu {
void write_kv_cache(const WriteKvCacheArgs& args);
}

}  // namespace moecore
