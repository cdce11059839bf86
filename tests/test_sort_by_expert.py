"""sort_by_expert against the oracle, exactly."""

import pytest
import torch

import oracle
from moecore import ops


def make_ids(num_tokens, top_k, low, high, seed=0):
    """Random ids in [low, high), repeated within a token where they happen to be."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num_tokens, top_k), generator=generator, dtype=torch.int32)


def check(device, topk_ids, num_local_experts, first_expert=0):
    got = ops.sort_by_expert(topk_ids.to(device), num_local_experts, first_expert=first_expert)
    want = oracle.sort_by_expert(topk_ids, num_local_experts, first_expert)
    assert [part.dtype for part in got] == [torch.int32, torch.int32, torch.int64]
    for name, got_part, want_part in zip(got._fields, got, want, strict=True):
        assert torch.equal(got_part.cpu().long(), want_part), name
    return got


CASES = {
    # ids, num_local_experts, first_expert
    "mixtral": (make_ids(257, 2, 0, 8), 8, 0),
    "qwen3": (make_ids(1000, 8, 0, 128), 128, 0),
    "one-token": (make_ids(1, 8, 0, 256), 256, 0),
    "one-expert": (make_ids(33, 1, 0, 1), 1, 0),
    "most-experts-empty": (make_ids(3, 2, 0, 300), 300, 0),
    "all-to-first": (torch.zeros(70, 4, dtype=torch.int32), 16, 0),
    "all-to-last": (torch.full((70, 4), 15, dtype=torch.int32), 16, 0),
    "no-tokens": (make_ids(0, 4, 0, 8), 8, 0),
    "top-k-is-all": (torch.arange(12, dtype=torch.int32).repeat(50, 1), 12, 0),
    "negative-dropped": (make_ids(200, 4, -6, 8), 8, 0),
    "past-the-end-dropped": (make_ids(200, 4, 0, 20), 8, 0),
    "all-dropped": (torch.full((9, 2), -1, dtype=torch.int32), 8, 0),
    "second-rank-of-four": (make_ids(500, 8, 0, 64), 16, 16),
    "last-rank": (make_ids(500, 8, -1, 64), 16, 48),
    "rank-without-tokens": (make_ids(50, 2, 0, 8), 8, 8),
    "extreme-ids": (torch.tensor([[2**31 - 1, -(2**31)], [0, 1]], dtype=torch.int32), 2, 0),
    "largest": (make_ids(4096, 8, 0, 1024), 1024, 0),
    "prefill": (make_ids(16384, 8, -1, 128), 128, 0),
    "prefill-on-one-expert": (torch.full((16384, 8), 3, dtype=torch.int32), 128, 0),
    "just-above-one-block": (make_ids(2049, 1, 0, 8), 8, 0),
}


@pytest.mark.parametrize(("ids", "num_local_experts", "first_expert"), CASES.values(), ids=CASES)
def test_matches_oracle(device, ids, num_local_experts, first_expert):
    check(device, ids, num_local_experts, first_expert)


def test_slots_of_an_expert_keep_their_order(device):
    ids = torch.tensor([[1, 0], [1, 2], [0, 1]], dtype=torch.int32)
    got = check(device, ids, 2)
    assert got.sorted_slots.tolist() == [1, 4, 0, 2, 5, -1]
    assert got.slot_to_row.tolist() == [2, 0, 3, -1, 1, 4]
    assert got.expert_offsets.tolist() == [0, 2, 5]


def test_ranks_share_out_every_slot(device):
    ids = make_ids(300, 6, 0, 40)
    kept = [
        ops.sort_by_expert(ids.to(device), 10, first_expert=first).slot_to_row >= 0
        for first in range(0, 40, 10)
    ]
    assert torch.stack(kept).sum(dim=0).eq(1).all()


BAD_IDS = {
    "int64": (lambda ids: ids.long(), "topk_ids must be int32, got int64"),
    "float32": (lambda ids: ids.float(), "topk_ids must be int32, got float32"),
    "one-dimension": (lambda ids: ids[0], r"topk_ids must have shape \[any, any\], got .*4"),
    "transposed": (lambda ids: ids.T, r"topk_ids must be contiguous, got strides \[1, 4\]"),
    "every-other": (lambda ids: ids[:, ::2], "topk_ids must be contiguous"),
}


@pytest.mark.parametrize(("change", "message"), BAD_IDS.values(), ids=BAD_IDS.keys())
def test_bad_ids_are_named_with_what_they_are(device, change, message):
    with pytest.raises(ValueError, match=message):
        ops.sort_by_expert(change(make_ids(6, 4, 0, 8).to(device)), 8)


@pytest.mark.parametrize("num_local_experts", [-3, 0, 1025])
def test_num_local_experts_out_of_range_is_named(device, num_local_experts):
    value = max(num_local_experts, 0)
    with pytest.raises(ValueError, match=rf"num_local_experts must be in .* got {value}\b"):
        ops.sort_by_expert(make_ids(6, 4, 0, 8).to(device), num_local_experts)


def test_a_negative_first_expert_is_named(device):
    with pytest.raises(ValueError, match="first_expert must be >= 0, got -1"):
        ops.sort_by_expert(make_ids(6, 4, 0, 8).to(device), 8, first_expert=-1)


@pytest.mark.parametrize("ids", [[[0, 1]], None])
def test_what_is_no_tensor_is_a_type_error(ids):
    with pytest.raises(TypeError, match="topk_ids must be a tensor"):
        ops.sort_by_expert(ids, 8)
