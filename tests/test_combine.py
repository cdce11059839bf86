"""combine: its order of operations, to the bit, and what it refuses."""

import pytest
import torch

import oracle
from moecore import ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_problem(num_tokens, top_k, hidden_size, dtype, dropped=0.0):
    """Rows in random order; a share of the slots is dropped."""
    generator = torch.Generator().manual_seed(5)
    num_slots = num_tokens * top_k
    slot_to_row = torch.randperm(num_slots, generator=generator, dtype=torch.int32)
    is_dropped = torch.rand(num_slots, generator=generator) < dropped
    return {
        "expert_rows": randn(num_slots, hidden_size, dtype=dtype, seed=1),
        "slot_to_row": slot_to_row.masked_fill(is_dropped, -1),
        "topk_weights": randn(num_tokens, top_k, seed=2),
    }


def emulated(
    expert_rows, slot_to_row, topk_weights, shared_output=None, shared_scale=None, out_dtype=None
):
    """The promised sum, one float32 fused multiply-add per choice.

    A product of two float32 is exact in float64, so only the addition rounds there, to 2**-53, and
    then once more to float32. The two differ from one rounding about once in 2**29 steps, which
    none of the inputs here meets.
    """

    def fma(weight, row, total):
        return (weight.double() * row.double() + total.double()).float()

    num_tokens, top_k = topk_weights.shape
    total = torch.zeros(num_tokens, expert_rows.shape[1])
    for choice in range(top_k):
        row = slot_to_row.view(num_tokens, top_k)[:, choice].long()
        added = fma(topk_weights[:, choice, None], expert_rows[row], total)
        total = torch.where(row[:, None] >= 0, added, total)
    if shared_output is not None:
        scale = torch.ones(num_tokens) if shared_scale is None else shared_scale
        total = fma(scale[:, None], shared_output, total)
    return total.to(out_dtype or expert_rows.dtype)


def on(device, problem):
    return {name: tensor.to(device) for name, tensor in problem.items()}


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got.cpu()), oracle.bits(want))


@pytest.mark.parametrize("hidden_size", [1, 15, 64, 100])
@pytest.mark.parametrize("top_k", [1, 2, 8, 32])
@DTYPES
def test_adds_in_the_order_of_the_choices(device, dtype, top_k, hidden_size):
    problem = make_problem(37, top_k, hidden_size, dtype)
    got = ops.combine(**on(device, problem))
    assert got.dtype == dtype
    assert_same_bits(got, emulated(**problem))
    # The emulation itself against the formula: k roundings of sums of these magnitudes.
    magnitude = oracle.combine(**{name: tensor.abs() for name, tensor in problem.items()})
    error = oracle.rounded(magnitude, top_k * oracle.EPS32 * magnitude, dtype)
    assert ((got.cpu().double() - oracle.combine(**problem)).abs() <= error).all()


@DTYPES
def test_dropped_slots_add_nothing(device, dtype):
    problem = make_problem(50, 4, 33, dtype, dropped=0.5)
    problem["slot_to_row"][:4] = -1  # a token without any row
    # Even where the weight is NaN, as a routing of another rank may have it.
    problem["topk_weights"][0, 0] = float("nan")
    got = ops.combine(**on(device, problem))
    assert got[0].eq(0).all()
    assert_same_bits(got, emulated(**problem))


@pytest.mark.parametrize("with_scale", [False, True], ids=["no-scale", "scale"])
@DTYPES
def test_the_shared_output_is_added_last(device, dtype, with_scale):
    problem = make_problem(21, 3, 70, dtype, dropped=0.2)
    problem["shared_output"] = randn(21, 70, dtype=dtype, seed=3)
    if with_scale:
        problem["shared_scale"] = randn(21, seed=4).sigmoid()
    assert_same_bits(ops.combine(**on(device, problem)), emulated(**problem))


@DTYPES
def test_the_output_may_be_the_shared_output(device, dtype):
    problem = make_problem(21, 3, 70, dtype)
    problem["shared_output"] = randn(21, 70, dtype=dtype, seed=3)
    arguments = on(device, problem)
    if device == "cpu":
        arguments["shared_output"] = arguments["shared_output"].clone()
    out = arguments["shared_output"]
    assert ops.combine(**arguments, out=out) is out
    assert_same_bits(out, emulated(**problem))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@DTYPES
def test_the_output_rounds_once_to_its_own_dtype(device, dtype, out_dtype):
    problem = make_problem(9, 2, 40, dtype)
    out = torch.empty(9, 40, dtype=out_dtype, device=device)
    ops.combine(**on(device, problem), out=out)
    assert_same_bits(out, emulated(**problem, out_dtype=out_dtype))


@DTYPES
def test_subnormal_sums_are_kept(device, dtype):
    problem = make_problem(5, 2, 40, dtype)
    # A whole row of subnormals, and some among normal numbers.
    problem["expert_rows"] = (problem["expert_rows"] * 2.0**-128).to(dtype)
    problem["expert_rows"][:, 20:] = 1.0
    problem["expert_rows"][:, 36] = 2.0**-130
    got = ops.combine(**on(device, problem)).cpu()
    assert_same_bits(got, emulated(**problem))
    assert got[:, :16].abs().amax() > 0


def test_rows_and_outputs_may_be_slices_of_wider_matrices(device):
    problem = make_problem(9, 2, 40, torch.float32)
    arguments = on(device, problem)
    wide = torch.zeros(18, 60, device=device)
    wide[:, 13:53] = arguments["expert_rows"]
    out = torch.full((9, 50), 5.0, device=device)
    ops.combine(
        wide[:, 13:53], arguments["slot_to_row"], arguments["topk_weights"], out=out[:, 5:45]
    )
    assert_same_bits(out[:, 5:45].contiguous(), emulated(**problem))
    assert out[:, :5].eq(5).all()
    assert out[:, 45:].eq(5).all()


def test_no_tokens_give_an_empty_output(device):
    assert ops.combine(**on(device, make_problem(0, 2, 40, torch.float32))).shape == (0, 40)


# T = 4, k = 2, H = 6.
BAD_ARGUMENTS = {
    "rows-float16": (
        lambda a: {"expert_rows": a["expert_rows"].half(), "out": a["out"]},
        "expert_rows must be .* got float16",
    ),
    "rows-columns": (
        lambda a: {"expert_rows": a["expert_rows"][:, :5].contiguous()},
        r"expert_rows must have shape \[any, 6\], got .*8, 5",
    ),
    "rows-transposed": (
        lambda a: {"expert_rows": a["expert_rows"].T.contiguous().T},
        "expert_rows must have contiguous rows",
    ),
    "weights-dtype": (
        lambda a: {"topk_weights": a["topk_weights"].bfloat16()},
        "topk_weights must be float32, got bfloat16",
    ),
    "weights-tokens": (
        lambda a: {"topk_weights": a["topk_weights"][:3]},
        r"topk_weights must have shape \[4, any\], got .*3, 2",
    ),
    "weights-stride": (
        lambda a: {"topk_weights": a["topk_weights"].T.contiguous().T},
        "topk_weights must be contiguous",
    ),
    "slots-dtype": (
        lambda a: {"slot_to_row": a["slot_to_row"].long()},
        "slot_to_row must be int32, got int64",
    ),
    "slots-shape": (
        lambda a: {"slot_to_row": a["slot_to_row"][:7]},
        r"slot_to_row must have shape \[8\], got .*7",
    ),
    "shared-shape": (
        lambda a: {"shared_output": a["out"].new_zeros(4, 5)},
        r"shared_output must have shape \[4, 6\], got .*4, 5",
    ),
    "shared-dtype": (
        lambda a: {"shared_output": a["out"].bfloat16()},
        "shared_output must be float32, got bfloat16",
    ),
    "scale-alone": (
        lambda a: {"shared_scale": a["topk_weights"][:, 0].contiguous()},
        "shared_scale must come with shared_output, got none",
    ),
    "scale-shape": (
        lambda a: {"shared_output": a["out"].clone(), "shared_scale": a["out"].new_zeros(3)},
        r"shared_scale must have shape \[4\], got .*3",
    ),
    "out-columns": (
        lambda a: {"out": a["out"].new_zeros(4, 0)},
        "output must have at least one column",
    ),
    "out-dtype": (lambda a: {"out": a["out"].int()}, "output must be .* got int32"),
    "out-overlaps-rows": (
        lambda a: {"out": a["expert_rows"][:4]},
        "output must not overlap expert_rows",
    ),
    "out-overlaps-part-of-shared": (
        lambda a: {"out": a["wide"][1:], "shared_output": a["wide"][:4]},
        "output must not overlap shared_output",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named_with_what_it_is(device, change, message):
    good = on(device, make_problem(4, 2, 6, torch.float32))
    good["out"] = torch.empty(4, 6, device=device)
    ops.combine(**good)
    bad = {**good, **change({**good, "wide": torch.zeros(5, 6, device=device)})}
    with pytest.raises(ValueError, match=message):
        ops.combine(**bad)


@pytest.mark.parametrize("row", [-2, 8, 2**31 - 1])
def test_on_the_cpu_a_row_out_of_range_is_named(row):
    problem = make_problem(4, 2, 6, torch.float32)
    problem["slot_to_row"][5] = row
    with pytest.raises(ValueError, match=rf"slot_to_row must be in \[-1, 8\).* {row} at slot 5"):
        ops.combine(**problem)


@pytest.mark.parametrize("name", ["expert_rows", "slot_to_row", "topk_weights"])
@pytest.mark.parametrize("value", [None, [1.0]])
def test_what_is_no_tensor_is_a_type_error(device, name, value):
    arguments = on(device, make_problem(4, 2, 6, torch.float32))
    out = torch.empty(4, 6, device=device)
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        ops.combine(**{**arguments, name: value}, out=out)
