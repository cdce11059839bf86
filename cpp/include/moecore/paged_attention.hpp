#pragma once

#include "moecore/kv_cache.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// Causal attention of this call's tokens to the positions up to their own:
///
///     s[i]   = scale * dot(query[t, h], key[i, h / (Hq / Hk)])      i = 0 .. position of t
///     output = sum(softmax(s)[i] * value[i, h / (Hq / Hk)])
///
/// in float32, key blocks of 64 in ascending order with a running maximum (on CUDA anew for every
/// 256 positions, whose results are then added up in order); the weights exp(s - max) round to the
/// cache's dtype before they multiply the values, the output rounds once. A row's bits depend on
/// its query and on the keys and values up to its position only: not on the other tokens or
/// sequences, on how its prompt was cut into calls, on the blocks' numbers or on threads. On CUDA
/// that takes finite values: where one later in a position's block of 64 is not, the row is NaN.
///
/// query   [T, Hq, D] of the cache's dtype, rows contiguous; Hq a multiple of Hk
/// output  like query; overlaps no input
/// scale   finite, > 0
/// Throws as write_kv_cache does.
void paged_attention(const TensorView& query, const KvCache& cache, const SequenceBatch& batch,
                     float scale, const TensorView& output, Stream stream = {});

}  // namespace moecore
