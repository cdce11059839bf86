#pragma once

#include "moecore/kv_cache.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// Stores the keys and values of this call's tokens at their positions. A block's first position
/// (a multiple of 64) clears the rest of its block.
///
/// key, value  [T, Hk, D] of the cache's dtype, rows contiguous; overlap no cache
/// REQUIRES: no block is written for two sequences.
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above, or the batch points
/// outside a tensor; UnsupportedError on a CUDA device, where torch's attention keeps its own
/// cache.
void write_kv_cache(const TensorView& key, const TensorView& value, const KvCache& cache,
                    const SequenceBatch& batch, Stream stream = {});

}  // namespace moecore
