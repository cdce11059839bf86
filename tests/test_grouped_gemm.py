"""grouped_gemm and linear: values against the oracle."""

import math

import pytest
import torch

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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@DTYPES
def test_every_activation_matches_the_oracle(device, dtype, config, layout):
    skip_prepared_on_cuda(device, layout)
    offsets = make_offsets(COUNTS)
    x = randn(offsets[-1], 65, dtype=dtype)
    weights = make_weights(len(COUNTS), 140, 65, dtype)
    bias = randn(len(COUNTS), 140, seed=2)
    got = ops.grouped_gemm(
        x.to(device),
        laid_out(weights.to(device), layout, config),
        offsets.to(device),
        bias=bias.to(device),
        config=ops.GroupedGemmConfig(**config),
    )
    assert got.dtype == dtype
    assert_close(got, *oracle.grouped_gemm(x, weights, offsets, bias=bias, **config))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k_dim", [1, 2, 33, 577, 1030])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 70])
@DTYPES
def test_any_size_matches_the_oracle(device, dtype, n, k_dim, layout):
    skip_prepared_on_cuda(device, layout)
    offsets = make_offsets(COUNTS)
    x = randn(offsets[-1], k_dim, dtype=dtype)
    weights = make_weights(len(COUNTS), n, k_dim, dtype)
    got = ops.grouped_gemm(x.to(device), laid_out(weights.to(device), layout), offsets.to(device))
    assert_close(got, *oracle.grouped_gemm(x, weights, offsets))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_bias_may_be_float32_or_the_inputs_dtype(device, bias_dtype):
    x = randn(9, 20, dtype=torch.bfloat16)
    weights = make_weights(2, 10, 20, torch.bfloat16)
    bias = randn(2, 10, seed=2).to(bias_dtype)
    offsets = make_offsets((4, 5))
    got = ops.grouped_gemm(
        x.to(device), weights.to(device), offsets.to(device), bias=bias.to(device)
    )
    assert_close(got, *oracle.grouped_gemm(x, weights, offsets, bias=bias))


@DTYPES
def test_rows_are_gathered_through_sorted_slots(device, dtype):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 6, (40, 3), generator=generator, dtype=torch.int32)
    slots = ops.sort_by_expert(ids.to(device), 6)
    x = randn(40, 50, dtype=dtype)
    weights = make_weights(6, 30, 50, dtype)
    got = ops.grouped_gemm(
        x.to(device),
        weights.to(device),
        slots.expert_offsets,
        sorted_slots=slots.sorted_slots,
        slots_per_token=3,
    )
    assert got.shape == (120, 30)
    offsets, sorted_slots = slots.expert_offsets.cpu(), slots.sorted_slots.cpu()
    want = oracle.grouped_gemm(x, weights, offsets, sorted_slots=sorted_slots, slots_per_token=3)
    assert_close(got[: offsets[-1]], *want)


def test_a_float32_output_of_bfloat16_is_not_rounded_to_bfloat16(device):
    x = randn(8, 100, dtype=torch.bfloat16)
    weights = make_weights(1, 24, 100, torch.bfloat16)
    offsets = make_offsets((8,))
    got = ops.grouped_gemm(
        x.to(device), weights.to(device), offsets.to(device), out_dtype=torch.float32
    )
    assert got.dtype == torch.float32
    assert_close(got, *oracle.grouped_gemm(x, weights, offsets))
    rounded = ops.grouped_gemm(x.to(device), weights.to(device), offsets.to(device))
    assert_same_bits(got.bfloat16(), rounded)


def test_rows_outside_every_group_are_not_written(device):
    x = randn(10, 16)
    weights = make_weights(2, 8, 16, torch.float32)
    offsets = torch.tensor([2, 4, 7])
    out = torch.full((10, 8), 5.0, device=device)
    got = ops.grouped_gemm(x.to(device), weights.to(device), offsets.to(device), out=out)
    assert got is out
    assert out[:2].eq(5).all()
    assert out[7:].eq(5).all()
    want, error = oracle.grouped_gemm(x, weights, offsets)
    assert_close(out[2:7], want[2:], error[2:])


def test_rows_and_outputs_may_be_slices_of_wider_matrices(device):
    x = randn(12, 80, dtype=torch.bfloat16).to(device)
    weights = make_weights(1, 70, 33, torch.bfloat16).to(device)
    out = torch.full((12, 90), 5.0, device=device, dtype=torch.bfloat16)
    ops.linear(x[:, 20:53], weights[0], out=out[:, 10:80])
    assert_same_bits(out[:, 10:80].contiguous(), ops.linear(x[:, 20:53].contiguous(), weights[0]))
    assert out[:, :10].eq(5).all()
    assert out[:, 80:].eq(5).all()


def test_no_rows_give_an_empty_output(device):
    weights = make_weights(3, 10, 20, torch.float32).to(device)
    offsets = make_offsets((0, 0, 0)).to(device)
    assert ops.grouped_gemm(randn(0, 20).to(device), weights, offsets).shape == (0, 10)
    assert ops.linear(randn(0, 20).to(device), weights[0]).shape == (0, 10)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_input_stays_in_its_row(device, value):
    x = randn(13, 40)
    x[5, 7] = value
    weights = make_weights(1, 70, 40, torch.float32)[0]
    got = ops.linear(x.to(device), weights.to(device)).cpu()
    assert not got[5].isfinite().any()
    assert got[torch.arange(13) != 5].isfinite().all()
