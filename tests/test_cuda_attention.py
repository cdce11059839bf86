"""write_kv_cache and paged_attention on CUDA: against float64, and what a row's bits depend on."""

import pytest
import torch

import moecore
import oracle
from kv_batches import BLOCK, batch_of, block_tables, empty_caches, randn
from moecore import ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and moecore.build_info()["has_cuda"]),
    reason="needs a GPU and a build with CUDA kernels",
)

# Hq, Hk, D: shared by 8, by 16 and more, by none; sizes that fill a tile and that do not.
HEADS = [(32, 4, 128), (8, 2, 64), (40, 1, 80), (3, 3, 16), (4, 2, 256), (48, 2, 96)]


def make_rows(num_tokens, num_heads, num_kv_heads, head_dim, seed=0):
    return tuple(
        randn(num_tokens, heads, head_dim, dtype=torch.bfloat16, seed=seed + i)
        for i, heads in enumerate((num_heads, num_kv_heads, num_kv_heads))
    )


def attend(sequences, chunks=None, *, scale=0.125, table_seed=0):
    """Outputs of (query, key, value) sequences, call c taking the c-th chunk of each."""
    lengths = [len(query) for query, _, _ in sequences]
    chunks = chunks or [[length] for length in lengths]
    tables, num_blocks = block_tables(lengths, seed=table_seed)
    # Garbage in what nobody wrote must stay unseen.
    shape = sequences[0][1].shape[1:]
    caches = [cache.cuda() for cache in empty_caches(num_blocks, *shape, torch.bfloat16)]
    done = [0] * len(sequences)
    outputs = [[] for _ in sequences]
    for step in range(max(len(counts) for counts in chunks)):
        counts = [counts[step] if step < len(counts) else 0 for counts in chunks]
        query, key, value = (
            torch.cat(
                [rows[i][d : d + n] for rows, d, n in zip(sequences, done, counts, strict=True)]
            ).cuda()
            for i in range(3)
        )
        done = [d + n for d, n in zip(done, counts, strict=True)]
        batch = {name: t.cuda() for name, t in batch_of(counts, done, tables).items()}
        ops.write_kv_cache(key, value, *caches, **batch)
        out = ops.paged_attention(query, *caches, **batch, scale=scale)
        for rows, part in zip(outputs, out.cpu().split(counts), strict=True):
            rows.append(part)
    assert done == lengths
    return [torch.cat(rows) for rows in outputs]


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got), oracle.bits(want))


@pytest.mark.parametrize("num_tokens", [1, 63, 300, 1100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_matches_the_float64_oracle(num_heads, num_kv_heads, head_dim, num_tokens):
    rows = make_rows(num_tokens, num_heads, num_kv_heads, head_dim)
    scale = head_dim**-0.5
    (got,) = attend([rows], scale=scale)
    want, error = oracle.attention(*rows, scale)
    assert ((got.double() - want).abs() <= error).all()


CHUNKS = {
    "one-by-one": [1] * 600,
    "prompt-then-tokens": [550] + [1] * 50,
    "ragged": [1, 62, 2, 15, 17, 232, 71, 200],
    "a-token-first": [1, 599],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_a_row_does_not_depend_on_how_its_prompt_is_cut(num_heads, num_kv_heads, head_dim, chunks):
    rows = make_rows(600, num_heads, num_kv_heads, head_dim)
    (want,) = attend([rows])
    (got,) = attend([rows], [chunks])
    assert_same_bits(got, want)


def test_a_row_does_not_depend_on_the_batch_or_the_blocks():
    lengths = [1, 64, 530, 7, 65, 2100] + [33] * 90
    sequences = [make_rows(n, 8, 2, 64, seed=10 * n) for n in lengths]
    chunks = [[n - 3, 1, 1, 1] if n > 3 else [n] for n in lengths]
    want = [attend([rows])[0] for rows in sequences]
    got = attend(sequences, chunks, table_seed=5)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


def test_what_lies_outside_the_cache_is_neither_read_nor_written():
    query, key, value = (rows.cuda() for rows in make_rows(100, 4, 2, 32))
    guard = torch.full((4, 1, BLOCK * 32), 7.0, dtype=torch.bfloat16, device="cuda")
    caches = guard[1:3], guard[1:3].clone()  # two heads of one block
    for table in ([[0, 1]], [[0, -1]], [[0, 2**31 - 1]], [[0]]):
        batch = batch_of([100], [100], torch.tensor(table, dtype=torch.int32))
        batch = {name: t.cuda() for name, t in batch.items()}
        ops.write_kv_cache(key, value, *caches, **batch)
        out = ops.paged_attention(query, *caches, **batch, scale=0.125)
        assert out[:64].isfinite().all()
        assert guard[0].eq(7).all()
        assert guard[3].eq(7).all()


def test_tokens_of_no_sequence_are_left_alone():
    query, key, value = (rows.cuda() for rows in make_rows(4, 4, 2, 32))
    caches = [cache.cuda() for cache in empty_caches(2, 2, 32, torch.bfloat16, fill=0.0)]
    batch = batch_of([1, 0], [1, 0], torch.tensor([[0], [1]], dtype=torch.int32))
    batch = {name: t.cuda() for name, t in batch.items()}
    ops.write_kv_cache(key, value, *caches, **batch)
    out = torch.full_like(query, 7.0)
    ops.paged_attention(query, *caches, **batch, scale=0.125, out=out)
    torch.testing.assert_close(out[0], value[0].repeat_interleave(2, dim=0))
    assert out[1:].eq(7).all()
    assert caches[0][:, 1].eq(0).all()
