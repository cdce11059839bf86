"""paged_attention: against float64, its independence of everything but the row, and its errors."""

import pytest
import torch

import moecore
import oracle
from kv_batches import BLOCK, batch_of, block_tables, empty_caches, randn
from moecore import ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def make_rows(num_tokens, num_heads, num_kv_heads, head_dim, dtype, seed=0):
    """query, key, value of one sequence."""
    return tuple(
        randn(num_tokens, heads, head_dim, dtype=dtype, seed=seed + i)
        for i, heads in enumerate((num_heads, num_kv_heads, num_kv_heads))
    )


def attend(sequences, chunks=None, *, scale=0.125, fill=float("nan"), table_seed=0):
    """Outputs of (query, key, value) sequences, call c taking the c-th chunk of each."""
    dtype, lengths = sequences[0][0].dtype, [len(query) for query, _, _ in sequences]
    chunks = chunks or [[length] for length in lengths]
    tables, num_blocks = block_tables(lengths, seed=table_seed)
    caches = empty_caches(num_blocks, *sequences[0][1].shape[1:], dtype, fill)
    done = [0] * len(sequences)
    outputs = [[] for _ in sequences]
    for step in range(max(len(counts) for counts in chunks)):
        counts = [counts[step] if step < len(counts) else 0 for counts in chunks]
        query, key, value = (
            torch.cat(
                [rows[i][d : d + n] for rows, d, n in zip(sequences, done, counts, strict=True)]
            )
            for i in range(3)
        )
        done = [d + n for d, n in zip(done, counts, strict=True)]
        batch = batch_of(counts, done, tables)
        ops.write_kv_cache(key, value, *caches, **batch)
        out = ops.paged_attention(query, *caches, **batch, scale=scale)
        for rows, part in zip(outputs, out.split(counts), strict=True):
            rows.append(part)
    assert done == lengths
    return [torch.cat(rows) for rows in outputs]


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got), oracle.bits(want))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(16, 4, 64), (8, 2, 128), (3, 3, 80), (7, 1, 16), (4, 2, 256), (2, 1, 2), (80, 1, 66)],
)
@DTYPES
def test_matches_the_float64_oracle(dtype, num_heads, num_kv_heads, head_dim):
    rows = make_rows(150, num_heads, num_kv_heads, head_dim, dtype)
    scale = head_dim**-0.5
    (got,) = attend([rows], scale=scale)
    assert got.dtype == dtype
    want, error = oracle.attention(*rows, scale)
    assert ((got.double() - want).abs() <= error).all()


@DTYPES
def test_large_scores_do_not_overflow(dtype):
    query, key, value = make_rows(200, 4, 2, 64, dtype)
    rows = (30 * query, 30 * key, value)
    (got,) = attend([rows])
    want, error = oracle.attention(*rows, 0.125)
    assert got.isfinite().all()
    assert ((got.double() - want).abs() <= error).all()


CHUNKS = {
    "one-by-one": [1] * 200,
    "prompt-then-tokens": [150] + [1] * 50,
    "ragged": [1, 62, 2, 15, 17, 32, 71],
    "blocks": [64, 128, 8],
    "a-token-first": [1, 199],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 64), (5, 1, 80)])
@DTYPES
def test_a_row_does_not_depend_on_how_its_prompt_is_cut(
    dtype, num_heads, num_kv_heads, head_dim, chunks
):
    rows = make_rows(200, num_heads, num_kv_heads, head_dim, dtype)
    (want,) = attend([rows])
    (got,) = attend([rows], [chunks])
    assert_same_bits(got, want)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@DTYPES
def test_a_row_does_not_depend_on_the_batch_the_blocks_or_the_threads(dtype, num_threads):
    lengths = [1, 64, 130, 7, 65]
    sequences = [make_rows(n, 6, 2, 32, dtype, seed=10 * n) for n in lengths]
    chunks = [[1], [60, 4], [128, 1, 1], [7], [1, 64]]
    before = moecore.num_threads()
    want = [attend([rows])[0] for rows in sequences]
    try:
        moecore.set_num_threads(num_threads)
        got = attend(sequences, chunks, table_seed=5, fill=3.0)
    finally:
        moecore.set_num_threads(before)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("num_threads", [1, 4])
@DTYPES
def test_threads_share_the_query_heads_of_one_kv_head(dtype, num_threads):
    rows = make_rows(70, 16, 1, 64, dtype)
    before = moecore.num_threads()
    try:
        moecore.set_num_threads(num_threads)
        (got,) = attend([rows], [[69, 1]])
    finally:
        moecore.set_num_threads(before)
    assert_same_bits(got, attend([rows])[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [3, 63, 64, 99])
@DTYPES
def test_nothing_after_a_position_is_seen(dtype, position, value):
    rows = make_rows(100, 4, 2, 80, dtype)
    (want,) = attend([rows])
    poisoned = tuple(tensor.clone() for tensor in rows)
    poisoned[1][position], poisoned[2][position] = value, value
    (got,) = attend([poisoned])
    assert_same_bits(got[:position], want[:position])
    assert not got[position].isfinite().any()


@pytest.mark.parametrize("later", [1.0, -1.0])
@DTYPES
def test_a_zero_is_positive_whatever_follows(dtype, later):
    # The first key outweighs the others, whose products are too small for a float32: sums become
    # -0, and the later values of the block, at weight 0, would decide on the sign that is left.
    query, key = torch.ones(70, 2, 16, dtype=dtype), torch.zeros(70, 1, 16, dtype=dtype)
    key[0] = 4.0
    value = torch.full((70, 1, 16), -(2.0**-149), dtype=dtype)
    value[0], value[9:] = 0.0, later
    for chunks in ([70], [1] * 70):
        (got,) = attend([(query, key, value)], [chunks])
        assert_same_bits(got[:9], torch.zeros(9, 2, 16, dtype=dtype))


@DTYPES
def test_sequences_may_share_the_blocks_of_a_prefix(dtype):
    first, second = (make_rows(100, 4, 2, 32, dtype, seed=seed) for seed in (1, 2))
    second = tuple(torch.cat([a[:64], b[64:]]) for a, b in zip(first, second, strict=True))
    want = [attend([rows])[0] for rows in (first, second)]
    tables = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    caches = empty_caches(3, 2, 32, dtype)
    ops.write_kv_cache(first[1], first[2], *caches, **batch_of([100], [100], tables[:1]))
    batch = batch_of([36], [100], tables[1:])
    ops.write_kv_cache(second[1][64:], second[2][64:], *caches, **batch)
    batch = batch_of([36, 36], [100, 100], tables)
    query = torch.cat([first[0][64:], second[0][64:]])
    got = ops.paged_attention(query, *caches, **batch, scale=0.125)
    assert_same_bits(got, torch.cat([rows[64:] for rows in want]))


@DTYPES
def test_queries_and_outputs_may_be_slices_of_wider_matrices(dtype):
    query, key, value = make_rows(70, 4, 2, 32, dtype)
    (want,) = attend([(query, key, value)])
    tables, num_blocks = block_tables([70])
    caches = empty_caches(num_blocks, 2, 32, dtype)
    batch = batch_of([70], [70], tables)
    ops.write_kv_cache(key, value, *caches, **batch)
    wide = torch.full((70, 300), 5.0, dtype=dtype)
    heads, out = wide[:, 8:136].unflatten(1, (4, 32)), wide[:, 140:268].unflatten(1, (4, 32))
    heads.copy_(query)
    assert ops.paged_attention(heads, *caches, **batch, scale=0.125, out=out) is out
    assert_same_bits(out.contiguous(), want)
    assert wide[:, :8].eq(5).all()
    assert wide[:, 268:].eq(5).all()


def test_no_tokens_give_an_empty_output():
    caches = empty_caches(1, 1, 8, torch.float32)
    query = torch.empty(0, 2, 8)
    for lens in ([], [3]):
        batch = batch_of([0] * len(lens), lens, torch.zeros(len(lens), 1).int())
        assert ops.paged_attention(query, *caches, **batch, scale=1.0).shape == (0, 2, 8)


# One token at position 69, Hq = 4, Hk = 2, D = 8. What the caches and the batch must be is tested
# with write_kv_cache: both ops make the same checks.
BAD_ARGUMENTS = {
    "query-2d": (lambda a: {"query": a["query"][0]}, r"query must have shape \[any, any, any\]"),
    "query-dtype": (lambda a: {"query": a["query"].bfloat16()}, "query must be float32"),
    "query-heads": (
        lambda a: {"query": a["query"][:, :3]},
        "query must have a multiple of the cache's 2 heads, got 3",
    ),
    "query-no-heads": (
        lambda a: {"query": a["query"][:, :0]},
        "query must have a multiple of the cache's 2 heads, got 0",
    ),
    "query-head-size": (
        lambda a: {"query": a["query"][..., :6].contiguous()},
        r"key_cache must have shape \[any, any, 384\], got .*512",
    ),
    "query-tokens": (
        lambda a: {"query": a["query"].repeat(2, 1, 1)},
        "query_offsets must go from 0 to 2, the number of tokens, got 0 to 1",
    ),
    "scale-zero": (lambda a: {"scale": 0.0}, "scale must be finite and > 0, got 0"),
    "scale-nan": (lambda a: {"scale": float("nan")}, "scale must be finite and > 0, got nan"),
    "out-shape": (
        lambda a: {"out": a["out"][:, :2]},
        r"output must have shape \[1, 4, 8\], got .*1, 2, 8",
    ),
    "out-dtype": (lambda a: {"out": a["out"].bfloat16()}, "output must be float32"),
    "out-is-query": (lambda a: {"out": a["query"]}, "output must not overlap query"),
    "out-in-cache": (
        lambda a: {"out": a["value_cache"][1, 2, :32].view(1, 4, 8)},
        "output must not overlap value_cache",
    ),
    "tables-block": (
        lambda a: {"block_tables": torch.tensor([[0, 4]], dtype=torch.int32)},
        r"block_tables must be in \[0, 4\), .* got 4 at sequence 0, block 1",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named_with_what_it_is(change, message):
    good = {
        "query": randn(1, 4, 8),
        "key_cache": torch.zeros(2, 4, BLOCK * 8),
        "value_cache": torch.zeros(2, 4, BLOCK * 8),
        **batch_of([1], [70], torch.tensor([[0, 3]], dtype=torch.int32)),
        "scale": 1.0,
        "out": torch.empty(1, 4, 8),
    }
    ops.paged_attention(**good)
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        ops.paged_attention(**{**good, **change(good)})


@pytest.mark.parametrize("name", ["query", "key_cache", "context_lens"])
def test_what_is_no_tensor_is_a_type_error(name):
    arguments = {
        "query": randn(1, 4, 8),
        "key_cache": torch.zeros(2, 4, BLOCK * 8),
        "value_cache": torch.zeros(2, 4, BLOCK * 8),
        **batch_of([1], [70], torch.tensor([[0, 3]], dtype=torch.int32)),
    }
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        ops.paged_attention(**{**arguments, name: None}, scale=1.0)
