#pragma once

#include "moecore/kernels/kv_cache.hpp"
#include "moecore/kv_cache.hpp"
#include "ops/check.hpp"

namespace moecore {

/// Checks a cache and a batch of `num_tokens` tokens whose heads have `head_dim` elements: every
/// block that these tokens or their keys lie in is inside the cache.
/// Throws UnsupportedError, naming `op`, unless the cache is on the CPU.
KvCacheArgs checked_kv_cache(const Check& check, const char* op, const KvCache& cache,
                             const SequenceBatch& batch, int64_t num_tokens, int64_t head_dim);

}  // namespace moecore
