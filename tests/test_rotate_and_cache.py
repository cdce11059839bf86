"""rotate_and_cache: the bits of its operators one after another, and what it refuses."""

import pytest
import torch

import oracle
from kv_batches import batch_of, block_tables, empty_caches, randn
from moecore import _core, ops

EPS = 1e-6
P = 700  # positions of the table

# Hq, Hk, D, rotary_dim: a lane has two, four and eight elements, and part of a head turns.
HEADS = [(8, 2, 128, 128), (3, 1, 16, 16), (4, 4, 80, 20), (6, 2, 256, 64), (0, 1, 32, 32)]
BATCHES = {
    "decodes": ([1, 1, 1], [1, 65, 600]),
    "one-decode": ([1], [70]),
    "prompts": ([70, 3, 130], [70, 64, 500]),
    "mixed": ([1, 0, 5], [9, 3, 64]),
    "none": ([], []),
}
WEIGHTS = {"no-norm": None, "norm": torch.bfloat16, "float32-norm": torch.float32}


def kinds(device):
    """What a cache may hold: on CUDA bfloat16."""
    return [torch.bfloat16] if device == "cuda" else [torch.bfloat16, torch.float32]


class Problem:
    def __init__(self, heads, batch, dtype, weights, device):
        num_query, num_key, dim, rotary_dim = heads
        query_lens, context_lens = batch
        self.num_query, self.num_key, self.device = num_query, num_key, device
        num_tokens = sum(query_lens)
        self.heads = randn(num_tokens, num_query + 2 * num_key, dim, dtype=dtype).to(device)
        norms = [None, None]
        if weights is not None:
            kind = torch.float32 if torch.float32 in (weights, dtype) else dtype
            norms = [randn(dim, dtype=kind, seed=seed).to(device) for seed in (1, 2)]
        self.norms = norms
        positions = [
            p for n, end in zip(query_lens, context_lens, strict=True) for p in range(end - n, end)
        ]
        self.positions = torch.tensor(positions, dtype=torch.int32, device=device)
        self.cos_sin = randn(P, rotary_dim, seed=3).to(device)
        tables, self.num_blocks = block_tables(context_lens)
        batch = batch_of(query_lens, context_lens, tables)
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self.shape = (max(1, self.num_blocks), num_key, dim, dtype)

    def caches(self):
        return [cache.to(self.device) for cache in empty_caches(*self.shape, fill=7.0)]

    def fused(self, *, interleaved=False, is_settled=False):
        """Query heads afterwards, and the caches."""
        heads, caches = self.heads.clone(), self.caches()
        where = (self.positions, self.cos_sin, interleaved)
        _core.rotate_and_cache(
            heads, *self.norms, EPS, *where, *caches, *self.batch.values(), is_settled
        )
        values = self.num_query + self.num_key
        assert torch.equal(heads[:, values:], self.heads[:, values:])
        return heads[:, : self.num_query], *caches

    def one_by_one(self, *, interleaved=False):
        heads, caches = self.heads.clone(), self.caches()
        sizes = [self.num_query, self.num_key, self.num_key]
        query, key, value = heads.split(sizes, dim=1)
        if self.norms[0] is not None:
            for part, weight in zip((query, key), self.norms, strict=True):
                ops.rms_norm(part, weight, EPS, out=part)
        turned = heads[:, : self.num_query + self.num_key]
        ops.rotary_embedding(turned, self.positions, self.cos_sin, interleaved=interleaved)
        ops.write_kv_cache(key, value, *caches, **self.batch)
        return query, *caches


def assert_same_bits(got, want):
    for one, other in zip(got, want, strict=True):
        assert torch.equal(oracle.bits(one.contiguous()), oracle.bits(other.contiguous()))


@pytest.mark.parametrize("is_settled", [False, True], ids=["plain", "settled"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_has_the_bits_of_one_after_the_other(heads, batch, weights, is_settled, device):
    for dtype in kinds(device):
        problem = Problem(heads, batch, dtype, weights, device)
        assert_same_bits(problem.fused(is_settled=is_settled), problem.one_by_one())


def test_pairs_side_by_side(device):
    problem = Problem(HEADS[2], BATCHES["prompts"], torch.bfloat16, torch.bfloat16, device)
    got = problem.fused(interleaved=True)
    assert_same_bits(got, problem.one_by_one(interleaved=True))
    assert not torch.equal(got[1], problem.fused()[1])


def test_copies_of_a_sequence_write_the_bits_of_one(device):
    if device == "cpu":
        pytest.skip("a captured batch's copies of a sequence are CUDA's")
    one = Problem(HEADS[0], ([1], [70]), torch.bfloat16, torch.bfloat16, device)
    four = Problem(HEADS[0], ([1] * 4, [70] * 4), torch.bfloat16, torch.bfloat16, device)
    four.heads = one.heads.repeat(4, 1, 1)
    four.batch["block_tables"] = one.batch["block_tables"].repeat(4, 1)
    four.shape = one.shape
    query, *caches = four.fused()
    alone, *want = one.fused()
    assert_same_bits(caches, want)
    assert_same_bits(query, alone.expand_as(query))


def test_what_lies_outside_the_cache_or_of_no_sequence_is_not_written(device):
    if device == "cpu":
        pytest.skip("an error there")
    problem = Problem(HEADS[0], ([2, 1], [2, 70]), torch.bfloat16, torch.bfloat16, device)
    for table in (-1, 2**31 - 1):
        problem.batch["block_tables"][1, 1] = table
        assert_same_bits(problem.fused(), problem.one_by_one())
    problem.batch["query_offsets"][1:] = 0
    query, *caches = problem.fused()
    assert_same_bits([query], [problem.one_by_one()[0]])
    assert all(cache.eq(7).all() for cache in caches)


def test_a_position_outside_the_table_is_nan_on_cuda(device):
    problem = Problem(HEADS[0], ([1, 1], [2, 5]), torch.bfloat16, torch.bfloat16, device)
    problem.positions[1] = P
    if device == "cpu":
        with pytest.raises(ValueError, match="rotate_and_cache: positions must be in"):
            problem.fused()
    else:
        query, *_ = problem.fused()
        assert query[1].isnan().all()
        assert query[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"heads": torch.zeros(1, 3, 128)}, "heads must be at least 4"),
        ({"heads": torch.zeros(3, 128)}, "heads must have shape"),
        ({"norms": [torch.zeros(128), None]}, "k_weight must come with q_weight"),
        ({"norms": [torch.zeros(64), torch.zeros(128)]}, "q_weight must have shape"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions must have shape"),
        ({"cos_sin": torch.zeros(P, 130)}, "cos_sin must"),
        ({"shape": (2, 2, 64, torch.float32)}, "key_cache must have shape"),
        ({"shape": (2, 2, 128, torch.bfloat16)}, "key must be bfloat16"),
    ],
)
def test_it_names_the_bad_argument(change, rule):
    problem = Problem(HEADS[0], ([1], [70]), torch.float32, torch.float32, "cpu")
    vars(problem).update(change)
    with pytest.raises(ValueError, match=f"rotate_and_cache: {rule}"):
        problem.fused()
