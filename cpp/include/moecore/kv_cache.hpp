#pragma once

#include <cstdint>

#include "moecore/tensor_view.hpp"

namespace moecore {

/// Tokens of one block of a paged key/value cache.
inline constexpr int kKvBlockSize = 64;

/// Largest head that write_kv_cache and paged_attention take.
inline constexpr int64_t kMaxHeadDim = 256;

/// Keys and values of one layer, in blocks of 64 positions. Both tensors are contiguous
/// [Hk, num_blocks, 64 * D], float32 or bfloat16, D even and at most 256. What they hold is written
/// by write_kv_cache and read by paged_attention only; a block of a head may be moved as a whole.
///
/// On CUDA (bfloat16 only, D a multiple of 16) a block of one head is its 64 positions in order, D
/// elements each. On the CPU its order is that of the panels the GEMM tiles read, in units of
/// 32-bit words (a pair of bfloat16, or one float32); c is the position mod 64, d an element:
///
///     keys    one panel, a column for each position: bfloat16 word (d / 2) * 64 + c holds
///             elements d and d + 1 (d even) of position c; float32 word d * 64 + c holds element d
///     values  columns in panels of 64, the last of D mod 64 (w columns in the panel of column d):
///             bfloat16 word (c / 2) * w + d mod 64 holds element d of positions c and c + 1
///             (c even); float32 word c * w + d mod 64 holds element d of position c
///
/// The panel of column d begins at word (d / 64) * 64 * 32 (bfloat16) or (d / 64) * 64 * 64.
struct KvCache {
    TensorView key;
    TensorView value;
};

/// Which tokens of a call belong to which sequence, and where its blocks lie. int32, contiguous.
/// Sequence s owns the tokens query_offsets[s] .. query_offsets[s + 1] - 1: the last of its
/// context_lens[s] positions, in order. Position p lies in block block_tables[s, p / 64].
struct SequenceBatch {
    TensorView query_offsets;  ///< [S + 1], non-decreasing from 0 to T
    TensorView context_lens;   ///< [S], with the tokens of this call
    TensorView block_tables;   ///< [S, B], rows contiguous; B * 64 >= every context length
    /// That no operation of the stream which may still run (see Settled) writes these, or the cache
    /// before the new tokens' positions: on CUDA, kernels then read them early.
    bool is_settled = false;
};

}  // namespace moecore
