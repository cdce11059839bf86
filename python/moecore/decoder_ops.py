"""The operators of a decoder around its linear layers, re-exported by moecore.ops.

T tokens, S sequences, n heads of a token, D elements of a head, N columns, P positions. All tensors
of a call are on one device. As everywhere in moecore.ops, a row's bits never depend on the other
rows of the call, on T, or on the thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecore import _core
from moecore._core import KV_BLOCK_SIZE, PackedWeights

__all__ = [
    "KV_BLOCK_SIZE",
    "embedding",
    "paged_attention",
    "rms_norm",
    "rotary_embedding",
    "write_kv_cache",
]


def rms_norm(
    input: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise each row by its root mean square.

    Computes, in float32, rounding where it says so to the dtype of `input`::

        x   = input, or round(input + residual), stored back into residual
        r   = 1 / sqrt(mean(x ** 2) + eps)
        out = round(weight * round(x * r))

    A row has the same bits on every device and instruction set.

    Args:
        input: [T, N], or [T, n, D] to normalise each head; float32 or bfloat16, rows contiguous.
        weight: [N] (or [D]) of input's dtype or float32.
        eps: finite, >= 0.
        residual: input's shape and dtype; changed in place to the new residual stream.
        out: input's shape and dtype (default: new); may be `input`, overlaps nothing else.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, stride or device above does not hold; the message names it.
        TypeError: an argument is no tensor.

    Example:
        >>> moecore.ops.rms_norm(torch.full((1, 4), 3.0), torch.ones(4), 0.0)
        tensor([[1., 1., 1., 1.]])
    """
    if out is None:
        out = _new_like(input)
    _core.rms_norm(input, weight, eps, residual, out)
    return out


def rotary_embedding(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Rotate pairs of each head's elements by the angles of its position, in place.

    Computes, for i in 0 .. rotary_dim / 2 - 1, in float32, rounding once::

        a, b = x[t, h, i], x[t, h, i + rotary_dim // 2]     # halves (GPT-NeoX, Llama)
        a, b = x[t, h, 2 * i], x[t, h, 2 * i + 1]           # interleaved (GPT-J)
        cos, sin = cos_sin[positions[t], i], cos_sin[positions[t], i + rotary_dim // 2]
        a, b = a * cos - b * sin, b * cos + a * sin

    Args:
        x: [T, n, D] float32 or bfloat16, rows contiguous; changed in place.
        positions: [T] int32 in [0, P). One outside is an error on the CPU, and NaN on CUDA.
        cos_sin: [P, rotary_dim] float32; rotary_dim even, at most D: the other elements stay.
        interleaved: which pairs, as above.

    Returns:
        `x`.

    Raises:
        ValueError: a shape, dtype, stride, range or device above does not hold; the message names
            it.
        TypeError: an argument is no tensor.
    """
    _core.rotary_embedding(x, positions, cos_sin, interleaved)
    return x


def embedding(ids: Tensor, weight: Tensor | PackedWeights, out: Tensor | None = None) -> Tensor:
    """Copy the rows `ids` of `weight`.

    Packed weights give back their rows bit for bit: an embedding tied to the output layer needs no
    second copy.

    Args:
        ids: [T] int32 or int64 in [0, N). One outside is an error on the CPU, and a row of NaN on
            CUDA.
        weight: [N, K] float32 or bfloat16, rows contiguous; or PackedWeights of one group, not
            gated.
        out: [T, K] of weight's dtype (default: new); overlaps no input.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, stride, range or device above does not hold; the message names
            it.
        TypeError: an argument is no tensor.
    """
    if out is None:
        rows = ids.shape[0] if isinstance(ids, Tensor) and ids.dim() > 0 else 0
        if isinstance(weight, PackedWeights):
            out = torch.empty(rows, weight.shape[2], dtype=getattr(torch, weight.dtype))
        else:
            columns = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() > 0 else 0
            out = torch.empty(
                (rows, columns),
                dtype=getattr(weight, "dtype", None),
                device=getattr(weight, "device", None),
            )
    _core.embedding(ids, weight, out)
    return out


def write_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_offsets: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
) -> None:
    """Store keys and values of this call's tokens in a paged cache.

    Sequence s owns tokens query_offsets[s] .. query_offsets[s + 1] - 1: the last of its
    context_lens[s] positions, in order. Position p lies in block block_tables[s, p // 64]. The
    order within a block is the core's own (moecore/kv_cache.hpp): blocks may be copied and moved as
    a whole, but only `paged_attention` reads them. On the CPU the first position of a block clears
    its rest. On CUDA the batch is not looked at by the host: what it places outside the cache is
    not written, and rows begin at multiples of 16 bytes.

    Args:
        key: [T, Hk, D] float32 or bfloat16, rows contiguous; D even, at most 256.
        value: like `key`.
        key_cache: [Hk, num_blocks, KV_BLOCK_SIZE * D] of key's dtype, contiguous; changed in place.
        value_cache: like `key_cache`.
        query_offsets: [S + 1] int32, non-decreasing from 0 to T.
        context_lens: [S] int32: each sequence's positions, those of this call included.
        block_tables: [S, B] int32 in [0, num_blocks), where a position needs it. No block may be
            written for two sequences.

    Raises:
        ValueError: a shape, dtype, stride, range or device above does not hold; the message names
            it.
        TypeError: an argument is no tensor.
        moecore.UnsupportedError: on CUDA, the cache is not bfloat16, or D no multiple of 16.
    """
    _core.write_kv_cache(
        key, value, key_cache, value_cache, query_offsets, context_lens, block_tables
    )


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_offsets: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Attend causally from this call's tokens to a paged cache.

    Computes, for token t at position p and head h, with h // (Hq // Hk) the head of the cache::

        w         = exp(scale * (query[t, h] @ key[:p + 1].T))
        out[t, h] = w / sum(w) @ value[:p + 1]

    with a running maximum, in float32, over blocks of 64 positions in ascending order; the weights
    round to the cache's dtype before they meet the values. A row's bits depend on its query and on
    keys and values up to its position: not on other tokens or sequences, how the prompt was cut
    into calls, or which blocks it lies in. What lies after a position is never seen, not even NaN;
    on CUDA a value that is not finite does make NaN of the rows before it in its block of 64.

    Args:
        query: [T, Hq, D] of the cache's dtype, rows contiguous; Hq a multiple of Hk.
        key_cache: as `write_kv_cache` fills it, with the keys of this call.
        value_cache: likewise.
        query_offsets: as in `write_kv_cache`.
        context_lens: as in `write_kv_cache`.
        block_tables: as in `write_kv_cache`; sequences may share blocks.
        scale: finite, > 0; 1 / sqrt(D) in most models.
        out: like `query` (default: new); overlaps no input.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, stride, range or device above does not hold; the message names
            it.
        TypeError: an argument is no tensor.
        moecore.UnsupportedError: as in `write_kv_cache`.
    """
    if out is None:
        out = _new_like(query)
    _core.paged_attention(
        query, key_cache, value_cache, query_offsets, context_lens, block_tables, scale, out
    )
    return out


def _new_like(tensor: object) -> Tensor:
    """An output for `tensor`; for no tensor an empty one, and the core names what it is."""
    return torch.empty_like(tensor) if isinstance(tensor, Tensor) else torch.empty(0)
