"""Attention over a paged cache: one small interface, so that libraries can take its place.

`NativeAttention` runs moecore's kernels, `TorchAttention` anything torch runs on. Both hold the
keys and values of every layer in blocks that the scheduler hands out.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moecore import ops
from moecore.batch import Batch
from moecore.config import ModelConfig


class Attention(Protocol):
    """Keys and values of all layers, and causal attention to them."""

    block_size: int  # tokens a block

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: Batch, *, out: Tensor
    ) -> None:
        """Store the batch's keys and values, then attend to each sequence's.

        query [T, Hq, D], key and value [T, Hk, D], out [T, Hq, D]; Hq is a multiple of Hk. A token
        attends to its own sequence's positions up to its own.
        """


def bytes_per_block(config: ModelConfig, dtype: torch.dtype, block_size: int) -> int:
    """Bytes of one block of the cache over all layers."""
    per_token = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    return config.num_layers * block_size * per_token


class NativeAttention:
    """moecore's kernels: a row's bits depend on its own sequence and position only.

    Attributes:
        keys, values: a cache for each layer, as `ops.write_kv_cache` describes it.
    """

    block_size = ops.KV_BLOCK_SIZE

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, num_blocks: int, device: torch.device
    ) -> None:
        self._scale = config.head_dim**-0.5
        shape = (config.num_kv_heads, num_blocks, self.block_size * config.head_dim)

        def blocks() -> Tensor:
            if device.type == "cpu":
                return _untouched(shape, dtype)
            return torch.empty(shape, dtype=dtype, device=device)

        self.keys = [blocks() for _ in range(config.num_layers)]
        self.values = [blocks() for _ in range(config.num_layers)]

    @staticmethod
    def serves(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the device has such kernels for this model."""
        if device.type == "cpu":
            return True
        return dtype == torch.bfloat16 and config.head_dim % 16 == 0 and config.head_dim <= 256

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: Batch, *, out: Tensor
    ) -> None:
        where = (batch.query_offsets, batch.context_lens, batch.block_tables)
        keys, values = self.keys[layer], self.values[layer]
        ops.write_kv_cache(key, value, keys, values, *where)
        ops.paged_attention(query, keys, values, *where, scale=self._scale, out=out)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in huge pages where the system grants them; memory is taken at first use of each.

    In pages of 4 KiB a step's reads of the cache would wait for address translation.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class TorchAttention:
    """torch's scaled_dot_product_attention, a sequence at a time, over gathered blocks.

    No other sequence changes a row's bits; how its prompt was cut into chunks may.
    """

    block_size = 64

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, num_blocks: int, device: torch.device
    ) -> None:
        shape = (num_blocks * self.block_size, config.num_kv_heads, config.head_dim)
        self._scale = config.head_dim**-0.5
        self._keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._layout: tuple[Batch, list[tuple[int, int, Tensor]], Tensor] | None = None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: Batch, *, out: Tensor
    ) -> None:
        sequences, new_slots = self._layout_of(batch)
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, new_slots, key)
        values.index_copy_(0, new_slots, value)
        for begin, end, slots in sequences:
            context, length = slots.shape[0], end - begin
            mask = None
            if length > 1:
                ones = torch.ones(length, context, dtype=torch.bool, device=query.device)
                mask = ones.tril(context - length)
            attended = scaled_dot_product_attention(
                query[begin:end].transpose(0, 1)[None],
                keys[slots].transpose(0, 1)[None],
                values[slots].transpose(0, 1)[None],
                attn_mask=mask,
                scale=self._scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            out[begin:end] = attended[0].transpose(0, 1)

    def _layout_of(self, batch: Batch) -> tuple[list[tuple[int, int, Tensor]], Tensor]:
        """Cache slots of each sequence's context, and those of the batch's own tokens."""
        if self._layout is None or self._layout[0] is not batch:
            offsets, contexts = batch.query_offsets.tolist(), batch.context_lens.tolist()
            within = torch.arange(self.block_size, device=batch.block_tables.device)
            sequences, new = [], []
            for s, context in enumerate(contexts):
                begin, end = offsets[s], offsets[s + 1]
                blocks = batch.block_tables[s, : -(-context // self.block_size)].long()
                slots = (blocks[:, None] * self.block_size + within).flatten()[:context]
                sequences.append((begin, end, slots))
                new.append(slots[context - (end - begin) :])
            self._layout = (batch, sequences, torch.cat(new))
        return self._layout[1], self._layout[2]
