"""The row contract where tensor cores do the work: bits of a row across tiles, gathers and batches.

Sizes here are multiples of 8 and weights plain, as the CUDA kernels for large tiles want them.
"""

import pytest
import torch

import oracle
from gemm_data import ACTIVATIONS, assert_close, assert_same_bits, make_weights, randn
from moecore import MoELayer, ops

SWIGLU = ops.GroupedGemmConfig(activation="swiglu")


def bf16(*shape, seed=0, device="cpu"):
    return randn(*shape, dtype=torch.bfloat16, seed=seed).to(device)


@pytest.mark.parametrize("config", [ops.GroupedGemmConfig(), SWIGLU], ids=["none", "swiglu"])
@pytest.mark.parametrize("n", [64, 272])
@pytest.mark.parametrize("k_dim", [136, 320])
def test_a_rows_bits_are_the_same_from_1_to_4096_rows(device, k_dim, n, config):
    x = bf16(4096, k_dim, device=device)
    weight = make_weights(1, n, k_dim, torch.bfloat16)[0].to(device)
    together = ops.linear(x, weight, config=config)
    for num_rows in (1, 8, 9, 31, 64, 65, 100, 128, 129, 192, 193, 1000):
        for first in (0, 4096 - num_rows):
            rows = slice(first, first + num_rows)
            assert_same_bits(ops.linear(x[rows], weight, config=config), together[rows])
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(4)).to(device)
    assert_same_bits(ops.linear(x[order], weight, config=config), together[order])


@pytest.mark.parametrize("num_rows", [1, 7, 30, 64, 130])
@pytest.mark.parametrize("config", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_a_projection_matches_the_oracle(device, config, num_rows):
    """K of whole blocks of 64, as real models have; outputs that are not aligned, and float32."""
    k_dim, n = 448, 240
    x, weights = bf16(num_rows, k_dim), make_weights(1, n, k_dim, torch.bfloat16)
    bias = randn(1, n, seed=2)
    want = oracle.grouped_gemm(x, weights, torch.tensor([0, num_rows]), bias=bias, **config)
    width = n if config["activation"] == "none" else n // 2
    for dtype, shift in ((torch.bfloat16, 0), (torch.bfloat16, 3), (torch.float32, 1)):
        memory = torch.full((num_rows + 1, width + 5), 7.0, dtype=dtype, device=device)
        got = memory[:num_rows, shift : shift + width]
        ops.linear(
            x.to(device),
            weights[0].to(device),
            bias[0].to(device),
            config=ops.GroupedGemmConfig(**config),
            out=got,
        )
        assert_close(got, *want)
        got.fill_(7.0)
        assert (memory == 7.0).all()  # nothing else was written


@pytest.mark.parametrize("num_rows", [1, 8, 32, 128])
@pytest.mark.parametrize(("n", "k_dim"), [(128, 2048), (2048, 4096), (5120, 2048)])
def test_few_weight_rows_have_the_bits_of_many(device, n, k_dim, num_rows):
    """The projections of a small model: their tiles depend on how many weight rows there are."""
    if device == "cpu":
        n, k_dim = n // 16, k_dim // 8
    x = bf16(num_rows, k_dim, device=device)
    weight = make_weights(1, n, k_dim, torch.bfloat16)[0].to(device)
    many = weight.repeat(17000 // n, 1)
    assert_same_bits(ops.linear(x, weight), ops.linear(x, many)[:, :n])
    assert_same_bits(ops.linear(x, weight), ops.linear(x.repeat(40, 1), weight)[-num_rows:])


@pytest.mark.parametrize("num_rows", [1, 6, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_narrow_matrix_has_the_bits_of_a_wide_one(dtype, num_rows):
    """A router of few experts fills a part of a panel, and only that part is multiplied."""
    x = randn(num_rows, 1100, dtype=dtype)
    wide = make_weights(1, 96, 1100, dtype)
    want = ops.linear(x, wide[0])
    for n in (1, 8, 31, 32, 33, 64, 65, 96):
        assert_same_bits(ops.linear(x, wide[0, :n].contiguous()), want[:, :n])
        assert_same_bits(ops.linear(x, ops.prepare_weights(wide[:, :n].contiguous())), want[:, :n])


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
