"""Weights, offsets and comparisons that the tests of grouped_gemm share."""

import math

import pytest
import torch

import oracle
from moecore import ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
ACTIVATIONS = {
    "none": {"activation": "none"},
    "swiglu": {"activation": "swiglu"},
    "swiglu-interleaved": {"activation": "swiglu", "interleaved": True},
    "clamped-swiglu": {"activation": "clamped_swiglu"},
    "gpt-oss": {"activation": "clamped_swiglu", "interleaved": True},
    "clamped-swiglu-tight": {
        "activation": "clamped_swiglu",
        "alpha": 0.5,
        "limit": 1.25,
        "up_offset": -0.5,
    },
    "gelu-tanh": {"activation": "gelu_tanh"},
}
COUNTS = (3, 0, 7, 1, 0, 13, 25)  # rows of each group: empty ones, and no multiple of a tile of 6
LAYOUTS = ["plain", "transposed", "prepared"]


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def make_weights(num_groups, n, k_dim, dtype):
    """Weights that give sums of size 3, so that clamps and both ends of a sigmoid are reached."""
    return randn(num_groups, n, k_dim, dtype=dtype, seed=1, scale=3 / math.sqrt(k_dim))


def make_offsets(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def laid_out(weights, layout, config=None):
    """The weights [G, N, K] as one of LAYOUTS."""
    if layout == "transposed":
        return weights.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "prepared":
        config = config or {}
        return ops.prepare_weights(
            weights,
            gated=config.get("activation", "none") != "none",
            interleaved=config.get("interleaved", False),
        )
    return weights


def skip_prepared_on_cuda(device, layout):
    if layout == "prepared" and device == "cuda":
        pytest.skip("prepared weights are for the CPU")


def assert_close(got, want, error):
    # `error` bounds the float32 computation: K products and a bias round K + 1 times, each by less
    # than eps of the sum of magnitudes. Then the output rounds once.
    excess = (got.cpu().double() - want).abs() - oracle.rounded(want, error, got.dtype)
    assert got.shape == want.shape
    assert (excess <= 0).all(), f"off by {excess.max().item():.3g} more than the bound"


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got), oracle.bits(want))
