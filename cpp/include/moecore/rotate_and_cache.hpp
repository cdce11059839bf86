#pragma once

#include "moecore/kv_cache.hpp"
#include "moecore/rotary_embedding.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Makes a pass's heads ready for attention: norm_and_rotate of query and key (without weights only
/// rotary_embedding), then write_kv_cache of key and value, with their bits. On CUDA one launch.
///
/// heads     [T, Hq + 2 Hk, D] of the cache's dtype: query, key, value; rows contiguous. Query is
///           changed in place; what key holds afterwards is not defined.
/// q_weight  [D] of heads' dtype or float32, contiguous, or absent; k_weight likewise, of the same
///           dtype, absent with it
/// positions, cos_sin, pairs   as rotary_embedding takes them
/// cache, batch   as write_kv_cache takes them; Hk is the cache's. With batch.is_settled, no
///           operation of the stream which may still run writes the weights, positions or cos_sin.
/// Throws as norm_and_rotate and write_kv_cache do.
void rotate_and_cache(const TensorView& heads, const TensorView& q_weight,
                      const TensorView& k_weight, float eps, const TensorView& positions,
                      const TensorView& cos_sin, RotaryPairs pairs, const KvCache& cache,
                      const SequenceBatch& batch, Stream stream = {});

}  // namespace moecore
