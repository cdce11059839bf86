"""grouped_gemm, linear and prepare_weights name the argument that is bad, and its value."""

import math

import pytest
import torch

from gemm_data import make_offsets, randn
from moecore import ops


# What grouped_gemm is called with below, and each way to spoil it. X = R = 6, K = 8, N = 4, G = 2.
def arguments(device):
    return {
        "input": randn(6, 8).to(device),
        "weights": randn(2, 4, 8).to(device),
        "expert_offsets": torch.tensor([0, 2, 6], device=device),
        "bias": randn(2, 4).to(device),
        "out": torch.empty(6, 4, device=device),
    }


SWIGLU = ops.GroupedGemmConfig(activation="swiglu")
BAD_ARGUMENTS = {
    "weights-dtype": (
        lambda a: {"weights": a["weights"].bfloat16()},
        "weights must be float32, got bfloat16",
    ),
    "input-float16": (lambda a: {"input": a["input"].half()}, "input must be .* got float16"),
    "input-int32": (lambda a: {"input": a["input"].int()}, "input must be .* got int32"),
    "input-columns": (
        lambda a: {"input": a["input"][:, :7].contiguous()},
        r"input must have shape \[any, 8\], got .*6, 7",
    ),
    "input-rank": (lambda a: {"input": a["input"][0]}, "input must have shape .* got .*8"),
    "input-transposed": (
        lambda a: {"input": a["input"].T.contiguous().T},
        r"input must have contiguous rows .* got strides \[1, 6\]",
    ),
    "input-expanded": (
        lambda a: {"input": a["input"][:1].expand(6, 8)},
        r"input must have contiguous rows .* got strides \[0, 1\]",
    ),
    "weights-rank": (lambda a: {"weights": a["weights"][0]}, "weights must have shape"),
    "weights-strided": (
        lambda a: {"weights": a["weights"].new_zeros(2, 8, 16)[:, ::2, ::2]},
        r"weights must have one of their last two .* got strides \[128, 32, 2\]",
    ),
    "weights-empty": (
        lambda a: {"weights": a["weights"][:, :0]},
        r"weights must have no empty dimension, got \[2, 0, 8\]",
    ),
    "bias-shape": (
        lambda a: {"bias": a["bias"][:1]},
        r"bias must have shape \[2, 4\], got .*1, 4",
    ),
    "bias-dtype": (
        lambda a: {"bias": a["bias"].bfloat16()},
        "bias must be float32.*, got bfloat16",
    ),
    "offsets-dtype": (
        lambda a: {"expert_offsets": a["expert_offsets"].int()},
        "expert_offsets must be int64, got int32",
    ),
    "offsets-shape": (
        lambda a: {"expert_offsets": a["expert_offsets"][:2]},
        r"expert_offsets must have shape \[3\], got .*2",
    ),
    "slots-dtype": (
        lambda a: {"sorted_slots": torch.arange(6, device=a["input"].device)},
        "sorted_slots must be int32, got int64",
    ),
    "slots-per-token": (
        lambda a: {"slots_per_token": 0},
        "slots_per_token must be >= 1, got 0",
    ),
    "out-columns": (
        lambda a: {"out": a["out"].new_empty(6, 5)},
        r"output must have shape \[any, 4\], got .*6, 5",
    ),
    "out-dtype": (lambda a: {"out": a["out"].int()}, "output must be .* got int32"),
    "out-overlaps-input": (
        lambda a: {"out": a["input"][:, :4]},
        "output must not overlap input",
    ),
    "out-overlaps-weights": (
        lambda a: {"out": a["weights"].view(-1)[:24].view(6, 4)},
        "output must not overlap weights",
    ),
    "out-overlaps-bias": (
        lambda a: {"out": a["out"], "bias": a["out"][:2]},
        "output must not overlap bias",
    ),
    "odd-gate": (
        lambda a: {
            "weights": a["weights"][:, :3],
            "bias": None,
            "out": a["out"].new_empty(6, 1),
            "config": SWIGLU,
        },
        "weights must have an even number of rows for a gated activation, got 3",
    ),
    "limit": (
        lambda a: {
            "config": ops.GroupedGemmConfig(activation="clamped_swiglu", limit=0.0),
            "out": a["out"].new_empty(6, 2),
        },
        "limit must be > 0, got 0",
    ),
    "alpha": (
        lambda a: {
            "config": ops.GroupedGemmConfig(activation="clamped_swiglu", alpha=math.nan),
            "out": a["out"].new_empty(6, 2),
        },
        "alpha must be finite, got nan",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named_with_what_it_is(device, change, message):
    good = arguments(device)
    ops.grouped_gemm(**good)
    with pytest.raises(ValueError, match=message):
        ops.grouped_gemm(**{**good, **change(good)})


SLOTS = torch.arange(6, dtype=torch.int32)
BAD_ROWS = {
    "decreasing": (
        {"expert_offsets": torch.tensor([0, 4, 3])},
        "expert_offsets must not decrease, got 4 then 3 at group 1",
    ),
    "negative-start": (
        {"expert_offsets": torch.tensor([-1, 2, 6])},
        "expert_offsets must start at 0 or above, got -1",
    ),
    "past-output": (
        {"expert_offsets": torch.tensor([0, 2, 7])},
        "expert_offsets must end within the 6 rows of output, got 7",
    ),
    "past-input": (
        {"expert_offsets": torch.tensor([0, 2, 7]), "out": torch.empty(7, 4)},
        "expert_offsets must end within the 6 rows of input, got 7",
    ),
    "past-slots": (
        {"sorted_slots": SLOTS[:5]},
        "expert_offsets must end within the 5 entries of sorted_slots, got 6",
    ),
    "slot-negative": (
        {"sorted_slots": SLOTS - 1},
        r"sorted_slots must be in \[0, 6\).* got -1 at row 0",
    ),
    "slot-past-end": (
        {"sorted_slots": SLOTS + 7, "slots_per_token": 2},
        r"sorted_slots must be in \[0, 12\).* got 12 at row 5",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_on_the_cpu_an_offset_or_slot_outside_its_tensor_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.grouped_gemm(**{**arguments("cpu"), **change})


@pytest.mark.parametrize("name", ["input", "weights", "expert_offsets"])
@pytest.mark.parametrize("value", [None, [[1.0]]])
def test_what_is_no_tensor_is_a_type_error(device, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        ops.grouped_gemm(**{**arguments(device), name: value, "out": None})


def test_prepared_weights_must_fit_the_activation_and_the_dtype():
    x, offsets = randn(6, 8), make_offsets((2, 4))
    weights = randn(2, 4, 8)
    with pytest.raises(ValueError, match="weights must be packed with gated = .* for this activ"):
        ops.grouped_gemm(x, ops.prepare_weights(weights), offsets, config=SWIGLU)
    with pytest.raises(ValueError, match="weights must be packed with gated = .* for this activ"):
        ops.grouped_gemm(x, ops.prepare_weights(weights, gated=True), offsets)
    with pytest.raises(ValueError, match="weights must be bfloat16 as the input is, got float32"):
        ops.grouped_gemm(x.bfloat16(), ops.prepare_weights(weights), offsets)


@pytest.mark.parametrize(
    ("weights", "gated", "message"),
    [
        (torch.zeros(4, 8), False, r"weights must have 3 dimensions, got shape \[4, 8\]"),
        (torch.zeros(1, 3, 8), True, "n must be >= 1, and even if gated, got 3"),
        (torch.zeros(1, 4, 0), False, "k_dim must be >= 1, got 0"),
        (torch.zeros(1, 4, 8, dtype=torch.int32), False, "dtype must be .* got int32"),
    ],
    ids=["rank", "odd-gate", "no-columns", "int32"],
)
def test_bad_weights_to_prepare_are_named(weights, gated, message):
    with pytest.raises(ValueError, match=message):
        ops.prepare_weights(weights, gated=gated)


def test_linear_names_what_does_not_fit(device):
    x, weight = randn(6, 8).to(device), randn(4, 8).to(device)
    with pytest.raises(ValueError, match="weight must have 2 dimensions, got"):
        ops.linear(x, weight[None], out=x.new_empty(6, 4))
    with pytest.raises(ValueError, match="bias must have 1 dimensions, got"):
        ops.linear(x, weight, weight)
    with pytest.raises(ValueError, match=r"output must have shape \[6, 4\], got .*7, 4"):
        ops.linear(x, weight, out=x.new_empty(7, 4))
    with pytest.raises(TypeError, match="weight must be a tensor"):
        ops.linear(x, None, out=x.new_empty(6, 4))


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation must be one of none, swiglu.* got relu"):
        ops.GroupedGemmConfig(activation="relu")
