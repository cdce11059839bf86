#pragma once

#include "moecore/kv_cache.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// Stores the keys and values of this call's tokens at their positions. On the CPU a block's first
/// position (a multiple of 64) clears the rest of its block.
///
/// key, value  [T, Hk, D] of the cache's dtype, rows contiguous; overlap no cache
/// REQUIRES: no block is written for two sequences.
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above, or the batch points
/// outside a tensor (checked on the CPU: on CUDA, where the host never sees the batch, what it
/// places outside the cache is not written); UnsupportedError on CUDA unless the cache is bfloat16
/// and D a multiple of 16. On CUDA the rows of key and value begin at multiples of 16 bytes.
void write_kv_cache(const TensorView& key, const TensorView& value, const KvCache& cache,
                    const SequenceBatch& batch, Stream stream = {});

}  // namespace moecore
