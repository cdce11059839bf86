#pragma once

#include "moecore/kernels/kv_cache.hpp"
#include "moecore/kernels/write_kv_cache.hpp"
#include "moecore/kv_cache.hpp"
#include "ops/check.hpp"

namespace moecore {

/// Checks a cache and a batch of `num_tokens` tokens whose heads have `head_dim` elements: every
/// block that these tokens or their keys lie in is inside the cache.
/// On CUDA the batch is not looked at. Throws UnsupportedError, naming `op`, where CUDA has no
/// kernel.
KvCacheArgs checked_kv_cache(const Check& check, const char* op, const KvCache& cache,
                             const SequenceBatch& batch, int64_t num_tokens, int64_t head_dim);

/// Rows [T, n, D] as the kernels of the cache's device read and write them.
void check_head_rows(const Check& check, const char* name, const TensorView& rows);

/// The checks of write_kv_cache.
WriteKvCacheArgs checked_write_kv_cache(const Check& check, const char* op, const TensorView& key,
                                        const TensorView& value, const KvCache& cache,
                                        const SequenceBatch& batch);

}  // namespace moecore
