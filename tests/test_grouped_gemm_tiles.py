"""The row contract where tensor cores do the work: bits of a row across tiles, gathers and batches.

Sizes here are multiples of 8 and weights plain, as the CUDA kernels for large tiles want them.
"""

import pytest
import torch

from gemm_data import assert_same_bits, make_weights, randn
from moecore import MoELayer, ops

SWIGLU = ops.GroupedGemmConfig(activation="swiglu")


def bf16(*shape, seed=0, device="cpu"):
    return randn(*shape, dtype=torch.bfloat16, seed=seed).to(device)


@pytest.mark.parametrize("config", [ops.GroupedGemmConfig(), SWIGLU], ids=["none", "swiglu"])
@pytest.mark.parametrize("n", [64, 272])
def test_a_rows_bits_are_the_same_from_1_to_4096_rows(device, n, config):
    x = bf16(4096, 136, device=device)
    weight = make_weights(1, n, 136, torch.bfloat16)[0].to(device)
    together = ops.linear(x, weight, config=config)
    for num_rows in (1, 8, 9, 31, 64, 65, 100, 128, 129, 192, 193, 1000):
        for first in (0, 4096 - num_rows):
            rows = slice(first, first + num_rows)
            assert_same_bits(ops.linear(x[rows], weight, config=config), together[rows])
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(4)).to(device)
    assert_same_bits(ops.linear(x[order], weight, config=config), together[order])


@pytest.mark.parametrize(
    "counts",
    [
        (3, 0, 7, 1, 0, 13),
        (200, 0, 65, 1, 193, 400),
        (900, 3, 0, 500, 385, 1, 1300),
        (0, 0, 900, 0),
        (0, 0, 0, 0),
    ],
    ids=["narrow", "wide", "pairs", "one-expert", "no-rows"],
)
def test_groups_and_gathers_do_not_change_a_rows_bits(device, counts):
    num_rows = sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0)], device=device)
    x = bf16(num_rows, 200, device=device)
    weights = make_weights(len(counts), 144, 200, torch.bfloat16).to(device)
    grouped = ops.grouped_gemm(x, weights, offsets, config=SWIGLU)
    first = 0
    for group, count in enumerate(counts):
        rows = slice(first, first + count)
        assert_same_bits(ops.linear(x[rows], weights[group], config=SWIGLU), grouped[rows])
        first += count
    # The same rows in another order of tokens, found through slots of two choices each.
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(5)).to(device)
    shuffled = torch.empty_like(x)
    shuffled[order] = x
    gathered = ops.grouped_gemm(
        shuffled,
        weights,
        offsets,
        sorted_slots=(2 * order + 1).int(),
        slots_per_token=2,
        config=SWIGLU,
    )
    assert_same_bits(gathered, grouped)


@pytest.mark.parametrize("inner", [1024, 2048], ids=["gathers-inside", "gathers-first"])
def test_a_tokens_bits_are_the_same_alone_and_among_thousands(device, inner):
    """Among thousands a layer's blocks take tiles as they get free, and experts' rows in pairs."""
    num_tokens, experts, hidden = 4096, 8, 64
    gate_up = make_weights(experts, 2 * inner, hidden, torch.bfloat16).to(device)
    down = make_weights(experts, hidden, inner, torch.bfloat16).to(device)
    layer = MoELayer(gate_up, down, ops.RoutingConfig(top_k=2))
    x = bf16(num_tokens, hidden, device=device)
    logits = randn(num_tokens, experts, dtype=torch.float32, seed=1).to(device)
    together = layer(x, logits)
    assert_same_bits(layer(x, logits), together)  # counters are ready for the next call
    for num_rows in (1, 40, 300, 1500):
        rows = slice(num_tokens - num_rows, num_tokens)
        assert_same_bits(layer(x[rows], logits[rows]), together[rows])
