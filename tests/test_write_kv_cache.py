"""write_kv_cache: the documented order within a block, bit for bit, and what it refuses."""

import pytest
import torch

import oracle
from kv_batches import BLOCK, batch_of, block_tables, empty_caches, randn
from moecore import ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def key_block(keys):
    """The documented order of keys [64, D]."""
    if keys.dtype == torch.bfloat16:
        return keys.unflatten(1, (-1, 2)).permute(1, 0, 2).flatten()
    return keys.T.flatten()


def value_block(values):
    """The documented order of values [64, D]."""
    panels = values.split(64, dim=1)
    if values.dtype == torch.bfloat16:
        panels = [panel.unflatten(0, (-1, 2)).permute(0, 2, 1) for panel in panels]
    return torch.cat([panel.flatten() for panel in panels])


def documented(order, rows, blocks, cache):
    """`cache` with the rows [n, Hk, D] of one sequence at positions 0 .. n - 1, 0 after them."""
    padded = torch.zeros(len(blocks), BLOCK, *rows.shape[1:], dtype=rows.dtype)
    padded.view(-1, *rows.shape[1:])[: len(rows)] = rows
    for block, within in zip(blocks.tolist(), padded, strict=True):
        for head in range(rows.shape[1]):
            cache[head, block] = order(within[:, head].contiguous())


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got), oracle.bits(want))


CHUNKS = {
    "at-once": [200],
    "one-by-one": [1] * 200,
    "ragged": [63, 2, 15, 16, 33, 71],
    "blocks": [64, 128, 8],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 128, 202, 256])
@DTYPES
def test_every_cut_of_a_prompt_fills_the_documented_order(dtype, head_dim, chunks):
    key, value = (randn(200, 3, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    tables, num_blocks = block_tables([200])
    caches = empty_caches(num_blocks + 2, 3, head_dim, dtype, fill=5.0)
    done = 0
    for count in chunks:
        rows = slice(done, done + count)
        done += count
        ops.write_kv_cache(key[rows], value[rows], *caches, **batch_of([count], [done], tables))
    want = empty_caches(num_blocks + 2, 3, head_dim, dtype, fill=5.0)
    documented(key_block, key, tables[0, :num_blocks], want[0])
    documented(value_block, value, tables[0, :num_blocks], want[1])
    assert_same_bits(caches[0], want[0])
    assert_same_bits(caches[1], want[1])


@DTYPES
def test_sequences_of_a_batch_go_to_their_own_blocks(dtype):
    lengths = [5, 64, 0, 130, 65]
    key, value = (randn(sum(lengths), 2, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    tables, num_blocks = block_tables(lengths)
    caches = empty_caches(num_blocks, 2, 32, dtype)
    ops.write_kv_cache(key, value, *caches, **batch_of(lengths, lengths, tables))
    want = empty_caches(num_blocks, 2, 32, dtype)
    for s, (k, v) in enumerate(zip(key.split(lengths), value.split(lengths), strict=True)):
        blocks = tables[s, : -(-lengths[s] // BLOCK)]
        documented(key_block, k, blocks, want[0])
        documented(value_block, v, blocks, want[1])
    assert_same_bits(caches[0], want[0])
    assert_same_bits(caches[1], want[1])


@DTYPES
def test_keys_and_values_may_be_slices_of_a_fused_projection(dtype):
    fused = randn(100, 300, dtype=dtype)
    key, value = fused[:, 50:114].unflatten(1, (2, 32)), fused[:, 114:178].unflatten(1, (2, 32))
    tables, num_blocks = block_tables([100])
    batch = batch_of([100], [100], tables)
    got, want = empty_caches(num_blocks, 2, 32, dtype), empty_caches(num_blocks, 2, 32, dtype)
    ops.write_kv_cache(key, value, *got, **batch)
    ops.write_kv_cache(key.contiguous(), value.contiguous(), *want, **batch)
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])


def test_no_tokens_change_nothing():
    caches = empty_caches(2, 1, 8, torch.float32, fill=5.0)
    rows = torch.empty(0, 1, 8)
    ops.write_kv_cache(rows, rows, *caches, **batch_of([0], [3], torch.zeros(1, 1).int()))
    ops.write_kv_cache(rows, rows, *caches, **batch_of([], [], torch.zeros(0, 0).int()))
    assert caches[0].eq(5).all()
    assert caches[1].eq(5).all()


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# T = 3 tokens of two sequences (1 and 2 tokens, lengths 70 and 2), Hk = 2, D = 8, 4 blocks.
BAD_ARGUMENTS = {
    "key-2d": (lambda a: {"key": a["key"][:, 0]}, r"key must have shape \[any, any, any\]"),
    "key-dtype": (lambda a: {"key": a["key"].bfloat16()}, "key must be float32, got bfloat16"),
    "key-odd": (
        lambda a: {"key": a["key"][..., :7].contiguous()},
        r"head size must be even and in \[2, 256\], got 7",
    ),
    "key-large": (
        lambda a: {"key": torch.zeros(3, 2, 258)},
        r"head size must be even and in \[2, 256\], got 258",
    ),
    "key-heads": (
        lambda a: {"key": a["key"][:, :1]},
        r"key must have shape \[3, 2, 8\], got .*3, 1, 8",
    ),
    "key-strides": (lambda a: {"key": a["key"].mT.contiguous().mT}, "key must have contiguous"),
    "value-shape": (
        lambda a: {"value": a["value"][:2]},
        r"value must have shape \[3, 2, 8\], got .*2, 2, 8",
    ),
    "value-dtype": (lambda a: {"value": a["value"].int()}, "value must be float32, got int32"),
    "key_cache-dtype": (
        lambda a: {"key_cache": a["key_cache"].int()},
        "key_cache must be float32 or bfloat16, got int32",
    ),
    "key_cache-shape": (
        lambda a: {"key_cache": a["key_cache"][..., :511].contiguous()},
        r"key_cache must have shape \[any, any, 512\], got .*511",
    ),
    "key_cache-strides": (
        lambda a: {"key_cache": a["key_cache"].repeat(1, 1, 2)[..., ::2]},
        "key_cache must be contiguous",
    ),
    "value_cache-dtype": (
        lambda a: {"value_cache": a["value_cache"].bfloat16()},
        "value_cache must be float32, got bfloat16",
    ),
    "value_cache-is-key_cache": (
        lambda a: {"value_cache": a["key_cache"]},
        "key_cache must not overlap value_cache",
    ),
    "offsets-dtype": (
        lambda a: {"query_offsets": a["query_offsets"].long()},
        "query_offsets must be int32, got int64",
    ),
    "offsets-size": (
        lambda a: {"query_offsets": int32(0, 3)},
        r"query_offsets must have shape \[3\], got .*2",
    ),
    "offsets-first": (
        lambda a: {"query_offsets": int32(1, 1, 3)},
        "query_offsets must go from 0 to 3, the number of tokens, got 1 to 3",
    ),
    "offsets-last": (
        lambda a: {"query_offsets": int32(0, 1, 4)},
        "query_offsets must go from 0 to 3, the number of tokens, got 0 to 4",
    ),
    "offsets-decrease": (
        lambda a: {"query_offsets": int32(0, 4, 3)},
        "query_offsets must not decrease, got 4 then 3 at sequence 1",
    ),
    "lens-dtype": (
        lambda a: {"context_lens": a["context_lens"].long()},
        "context_lens must be int32",
    ),
    "lens-short": (
        lambda a: {"context_lens": int32(70, 1)},
        r"context_lens must be in \[2, 128\].* got 1 at sequence 1",
    ),
    "lens-long": (
        lambda a: {"context_lens": int32(129, 2)},
        r"context_lens must be in \[1, 128\].* got 129 at sequence 0",
    ),
    "tables-dtype": (
        lambda a: {"block_tables": a["block_tables"].long()},
        "block_tables must be int32",
    ),
    "tables-rows": (
        lambda a: {"block_tables": a["block_tables"][:1]},
        r"block_tables must have shape \[2, any\], got .*1, 2",
    ),
    "tables-block": (
        lambda a: {"block_tables": int32(0, 4, 2, 9).view(2, 2)},
        r"block_tables must be in \[0, 4\), .* got 4 at sequence 0, block 1",
    ),
    "tables-negative": (
        lambda a: {"block_tables": int32(0, 1, -1, 9).view(2, 2)},
        r"block_tables must be in \[0, 4\), .* got -1 at sequence 1, block 0",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named_with_what_it_is(change, message):
    good = {
        "key": randn(3, 2, 8),
        "value": randn(3, 2, 8),
        "key_cache": torch.zeros(2, 4, 512),
        "value_cache": torch.zeros(2, 4, 512),
        "query_offsets": int32(0, 1, 3),
        "context_lens": int32(70, 2),
        "block_tables": int32(0, 1, 2, 9).view(2, 2),
    }
    ops.write_kv_cache(**good)
    with pytest.raises(ValueError, match=f"write_kv_cache: {message}"):
        ops.write_kv_cache(**{**good, **change(good)})


def test_a_cache_that_overlaps_a_key_is_refused():
    cache = torch.zeros(1, 4, 512)
    batch = batch_of([1], [1], int32(0).view(1, 1))
    key = cache[:, 3, :8].unsqueeze(0)
    with pytest.raises(ValueError, match="key_cache must not overlap key"):
        ops.write_kv_cache(key, torch.zeros(1, 1, 8), cache, torch.zeros(1, 4, 512), **batch)


@pytest.mark.parametrize("name", ["key", "value", "key_cache", "value_cache", "block_tables"])
def test_what_is_no_tensor_is_a_type_error(name):
    rows, cache = torch.zeros(1, 1, 8), torch.zeros(1, 4, 512)
    arguments = {"key": rows, "value": rows, "key_cache": cache, "value_cache": cache.clone()}
    arguments |= batch_of([1], [1], int32(0).view(1, 1))
    ops.write_kv_cache(**arguments)
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        ops.write_kv_cache(**{**arguments, name: None})
