"""The row contract: a row's bits depend on the row and the weights, and on nothing else."""

import itertools

import pytest
import torch

import moecore
import oracle
from gemm_data import (
    ACTIVATIONS,
    COUNTS,
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_same_bits,
    laid_out,
    make_offsets,
    make_weights,
    randn,
    skip_prepared_on_cuda,
)
from moecore import ops


@pytest.mark.parametrize("n", [2, 66, 128])
@DTYPES
def test_gated_outputs_of_any_width_have_the_same_bits_in_every_layout(device, dtype, n):
    config = {"activation": "swiglu", "interleaved": True}
    offsets = make_offsets(COUNTS)
    x = randn(offsets[-1], 47, dtype=dtype)
    weights = make_weights(len(COUNTS), n, 47, dtype)
    results = [
        ops.grouped_gemm(
            x.to(device),
            laid_out(weights.to(device), layout, config),
            offsets.to(device),
            config=ops.GroupedGemmConfig(**config),
        )
        for layout in LAYOUTS
        if not (layout == "prepared" and device == "cuda")
    ]
    assert_close(results[0], *oracle.grouped_gemm(x, weights, offsets, **config))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("k_dim", [1, 33, 577, 1030])
@DTYPES
def test_every_layout_gives_the_same_bits(device, dtype, k_dim):
    offsets = make_offsets(COUNTS).to(device)
    x = randn(int(offsets[-1]), k_dim, dtype=dtype).to(device)
    weights = make_weights(len(COUNTS), 70, k_dim, dtype).to(device)
    plain = ops.grouped_gemm(x, weights, offsets)
    transposed = laid_out(weights, "transposed")
    assert_same_bits(ops.grouped_gemm(x, transposed, offsets), plain)
    if device == "cpu":
        prepared = ops.prepare_weights(weights)
        assert_same_bits(ops.grouped_gemm(x, prepared, offsets), plain)
        prepared = ops.prepare_weights(transposed)
        assert_same_bits(ops.grouped_gemm(x, prepared, offsets), plain)


@pytest.mark.parametrize("layout", ["plain", "prepared"])
@DTYPES
def test_a_rows_bits_do_not_depend_on_the_batch(device, dtype, layout):
    skip_prepared_on_cuda(device, layout)
    x = randn(512, 577, dtype=dtype).to(device)
    weight = laid_out(make_weights(1, 70, 577, dtype).to(device), layout)
    if layout == "plain":
        weight = weight[0]
    together = ops.linear(x, weight)
    for num_tokens in (1, 2, 3, 5, 6, 7, 12, 13, 64):
        assert_same_bits(ops.linear(x[:num_tokens], weight), together[:num_tokens])
    order = torch.randperm(512, generator=torch.Generator().manual_seed(4)).to(device)
    assert_same_bits(ops.linear(x[order], weight), together[order])


@DTYPES
def test_a_rows_bits_do_not_depend_on_its_group_or_the_gather(device, dtype):
    x = randn(49, 130, dtype=dtype).to(device)
    weights = make_weights(len(COUNTS), 66, 130, dtype).to(device)
    offsets = make_offsets(COUNTS)
    grouped = ops.grouped_gemm(x, weights, offsets.to(device))
    for group, (first, last) in enumerate(itertools.pairwise(offsets)):
        assert_same_bits(ops.linear(x[first:last], weights[group]), grouped[first:last])
    backwards = torch.arange(48, -1, -1, dtype=torch.int32, device=device)
    gathered = ops.grouped_gemm(
        x.flip(0), weights, offsets.to(device), sorted_slots=backwards, slots_per_token=1
    )
    assert_same_bits(gathered, grouped)


@DTYPES
def test_bits_do_not_depend_on_the_thread_count(any_num_threads, dtype):
    x = randn(100, 577, dtype=dtype)
    weights = make_weights(2, 200, 577, dtype)
    offsets = make_offsets((37, 63))
    results = []
    for num_threads in (1, 2):
        moecore.set_num_threads(num_threads)
        assert moecore.num_threads() == num_threads
        results.append(ops.grouped_gemm(x, weights, offsets))
    assert_same_bits(*results)


@pytest.mark.parametrize("config", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@DTYPES
def test_linear_is_grouped_gemm_of_one_group(device, dtype, config):
    x = randn(23, 90, dtype=dtype).to(device)
    weights = make_weights(1, 70, 90, dtype).to(device)
    bias = randn(1, 70, seed=2).to(device)
    config = ops.GroupedGemmConfig(**config)
    offsets = torch.tensor([0, 23], device=device)
    grouped = ops.grouped_gemm(x, weights, offsets, bias=bias, config=config)
    assert_same_bits(ops.linear(x, weights[0], bias[0], config=config), grouped)


def test_prepared_weights_outlive_the_original(device):
    if device == "cuda":
        weights = make_weights(1, 8, 8, torch.float32).to(device)
        with pytest.raises(moecore.UnsupportedError, match="weights must be on the CPU, got cuda"):
            ops.prepare_weights(weights)
        return
    x, weights = randn(3, 20), make_weights(2, 10, 20, torch.float32)
    offsets = make_offsets((1, 2))
    prepared = ops.prepare_weights(weights)
    assert (prepared.dtype, prepared.shape, prepared.gated) == ("float32", (2, 10, 20), False)
    want = ops.grouped_gemm(x, weights, offsets)
    weights.zero_()
    assert_same_bits(ops.grouped_gemm(x, prepared, offsets), want)
