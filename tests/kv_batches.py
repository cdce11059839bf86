"""Batches over a paged cache, for the tests of write_kv_cache and paged_attention."""

import torch

from moecore import ops

BLOCK = ops.KV_BLOCK_SIZE


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block_tables(lengths, seed=0):
    """[S, B] with every sequence's blocks in random places, and the number of blocks."""
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    tables = torch.full((len(lengths), max(counts, default=0) + 1), -7, dtype=torch.int32)
    for table, blocks in zip(tables, order.split(counts), strict=True):
        table[: len(blocks)] = blocks
    return tables, sum(counts)


def batch_of(query_lens, context_lens, tables):
    """The three tensors that say which token belongs where."""
    offsets = torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32)
    return {
        "query_offsets": offsets,
        "context_lens": torch.tensor(context_lens, dtype=torch.int32),
        "block_tables": tables,
    }


def empty_caches(num_blocks, num_kv_heads, head_dim, dtype, fill=float("nan")):
    shape = (num_kv_heads, num_blocks, BLOCK * head_dim)
    return torch.full(shape, fill, dtype=dtype), torch.full(shape, fill, dtype=dtype)
