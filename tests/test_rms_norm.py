"""rms_norm: its promised steps to the bit, its residual stream, and what it refuses."""

import pytest
import torch

import oracle
from moecore import ops

DTYPES = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=["float32", "bfloat16", "bfloat16-float32-weight"],
)
WIDTHS = pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 128, 1000])


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got.cpu()), oracle.bits(want.cpu()))


def assert_close(got, x, weight, eps):
    """Within the error of the promised float32 steps, from the rounded input on."""
    want = oracle.rms_norm(x, weight, eps)
    # Squares and their sum: (N / 64 + 8) eps / 2 of positive terms, halved by the square root; the
    # division, eps, root, reciprocal and product round once each.
    relative = (x.shape[-1] / 64 + 16) * oracle.EPS32
    error = oracle.rounded(want, relative * want.abs(), x.dtype)
    # The inner rounding to the dtype, then the product's.
    error = oracle.rounded(want, error, x.dtype)
    assert ((got.cpu().double() - want).abs() <= error).all()


@WIDTHS
@DTYPES
def test_matches_the_float64_oracle(device, dtype, weight_dtype, width):
    x, weight = randn(37, width, dtype=dtype, seed=1), randn(width, dtype=weight_dtype, seed=2)
    got = ops.rms_norm(x.to(device), weight.to(device), 1e-5)
    assert got.dtype == dtype
    assert_close(got, x, weight, 1e-5)


def test_rounds_the_normalised_row_before_the_weight_multiplies_it(device):
    # 257 * r is no bfloat16: with weight 3 one rounding and two give different results somewhere.
    x, weight = randn(64, 256, dtype=torch.bfloat16, seed=3), randn(256, seed=4)
    got = ops.rms_norm(x.to(device), weight.to(device), 0.0).cpu()
    r = (x.double().square().mean(dim=1, keepdim=True)).rsqrt().float()
    inner = (x.float() * r).bfloat16().float()
    agree = (got == (weight * inner).bfloat16()).double().mean()
    once = (got == (weight * (x.float() * r)).bfloat16()).double().mean()
    # r itself may be one float32 apart, which moves one in some 2**15 roundings.
    assert agree > 0.999
    assert once < 0.9


def emulated(x, weight, eps):
    """The promised steps, float32 by float32.

    A product of two float32 is exact in float64, so a fused multiply-add rounds there to 2**-53 and
    then once to float32: apart from one rounding about once in 2**29 sums, none of them here.
    """
    num_rows, width = x.shape
    padded = torch.zeros(num_rows, -(-width // 64) * 64, dtype=torch.float64)
    padded[:, :width] = x.double()
    partial = torch.zeros(num_rows, 64)
    for columns in padded.split(64, dim=1):
        partial = (columns * columns + partial.double()).float()
    first, second, third, fourth = partial.split(16, dim=1)
    total = (first + second) + (third + fourth)
    for half in (8, 4, 2, 1):
        total = total[:, :half] + total[:, half:]
    # torch's float32 root is not the nearest one; float64's, rounded, is.
    root = (total / width + torch.tensor(eps)).double().sqrt().float()
    scale = 1.0 / root
    return (weight.float() * (x.float() * scale).to(x.dtype).float()).to(x.dtype)


@WIDTHS
@DTYPES
def test_takes_the_promised_steps_to_the_bit(device, dtype, weight_dtype, width):
    x, weight = randn(37, width, dtype=dtype, seed=1), randn(width, dtype=weight_dtype, seed=2)
    got = ops.rms_norm(x.to(device), weight.to(device), 1e-5)
    assert_same_bits(got, emulated(x, weight, 1e-5))


@WIDTHS
@DTYPES
def test_the_residual_becomes_the_rounded_sum(device, dtype, weight_dtype, width):
    x, weight = randn(9, width, dtype=dtype, seed=1), randn(width, dtype=weight_dtype, seed=2)
    residual = randn(9, width, dtype=dtype, seed=3)
    stream = residual.clone().to(device)
    got = ops.rms_norm(x.to(device), weight.to(device), 1e-6, residual=stream)
    assert_same_bits(stream, (x.float() + residual.float()).to(dtype))
    assert_same_bits(got, ops.rms_norm(stream, weight.to(device), 1e-6))


@DTYPES
def test_a_row_has_the_same_bits_in_every_batch(device, dtype, weight_dtype):
    x, weight = randn(70, 193, dtype=dtype), randn(193, dtype=weight_dtype, seed=2)
    x, weight = x.to(device), weight.to(device)
    together = ops.rms_norm(x, weight, 1e-6)
    alone = torch.cat([ops.rms_norm(row[None], weight, 1e-6) for row in x])
    assert_same_bits(together, alone)


@DTYPES
def test_heads_of_a_token_are_rows(device, dtype, weight_dtype):
    x, weight = randn(11, 5, 48, dtype=dtype).to(device), randn(48, dtype=weight_dtype).to(device)
    got = ops.rms_norm(x, weight, 1e-6)
    assert_same_bits(got, ops.rms_norm(x.view(55, 48), weight, 1e-6).view(11, 5, 48))


@DTYPES
def test_slices_of_a_wider_matrix_are_normalised_in_place(device, dtype, weight_dtype):
    fused, weight = randn(7, 200, dtype=dtype).to(device), randn(32, dtype=weight_dtype).to(device)
    before = fused.clone()
    heads = fused[:, 8:136].unflatten(1, (4, 32))
    want = ops.rms_norm(heads.contiguous(), weight, 1e-6)
    assert ops.rms_norm(heads, weight, 1e-6, out=heads) is heads
    assert_same_bits(heads.contiguous(), want)
    assert_same_bits(fused[:, :8].contiguous(), before[:, :8].contiguous())
    assert_same_bits(fused[:, 136:].contiguous(), before[:, 136:].contiguous())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(device, dtype, value):
    x = randn(3, 40, dtype=dtype)
    x[1, 7] = value
    got = ops.rms_norm(x.to(device), torch.ones(40, dtype=dtype, device=device), 1e-6).cpu()
    assert got[1, 7].isnan()
    assert got[[0, 2]].isfinite().all()


def test_no_tokens_give_an_empty_output(device):
    weight = torch.ones(40, device=device)
    assert ops.rms_norm(torch.empty(0, 40, device=device), weight, 1e-6).shape == (0, 40)
    assert ops.rms_norm(torch.empty(3, 0, 40, device=device), weight, 1e-6).shape == (3, 0, 40)


# input [4, 6].
BAD_ARGUMENTS = {
    "input-dtype": (lambda a: {"input": a["input"].int()}, "input must be .* got int32"),
    "input-1d": (lambda a: {"input": a["weight"]}, "input must have 2 or 3 dimensions, got .*6"),
    "input-no-columns": (lambda a: {"input": a["input"][:, :0]}, "at least one column"),
    "input-transposed": (
        lambda a: {"input": a["input"].T.contiguous().T},
        "input must have contiguous rows",
    ),
    "weight-size": (
        lambda a: {"weight": a["weight"][:5]},
        r"weight must have shape \[6\], got .*5",
    ),
    "weight-dtype": (
        lambda a: {"weight": a["weight"].bfloat16()},
        "weight must be float32, got bfloat16",
    ),
    "eps-negative": (lambda a: {"eps": -1.0}, "eps must be finite and >= 0, got -1"),
    "eps-nan": (lambda a: {"eps": float("nan")}, "eps must be finite and >= 0, got nan"),
    "residual-shape": (
        lambda a: {"residual": a["input"][:3].clone()},
        r"residual must have shape \[4, 6\], got .*3, 6",
    ),
    "residual-dtype": (
        lambda a: {"residual": a["input"].bfloat16()},
        "residual must be float32, got bfloat16",
    ),
    "residual-is-input": (
        lambda a: {"residual": a["input"]},
        "residual must not overlap input",
    ),
    "out-is-residual": (
        lambda a: {"residual": a["out"]},
        "output must not overlap residual",
    ),
    "out-overlaps-input": (
        lambda a: {"input": a["wide"][:4], "out": a["wide"][1:]},
        "output must not overlap input",
    ),
    "out-shape": (
        lambda a: {"out": a["out"].new_zeros(4, 1, 6)},
        r"output must have shape \[4, 6\], got .*4, 1, 6",
    ),
    "out-dtype": (lambda a: {"out": a["out"].bfloat16()}, "output must be float32"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named_with_what_it_is(device, change, message):
    good = {
        "input": randn(4, 6).to(device),
        "weight": torch.ones(6, device=device),
        "eps": 1e-6,
        "out": torch.empty(4, 6, device=device),
    }
    ops.rms_norm(**good)
    bad = {**good, **change({**good, "wide": torch.zeros(5, 6, device=device)})}
    with pytest.raises(ValueError, match=f"rms_norm: .*{message}"):
        ops.rms_norm(**bad)


@pytest.mark.parametrize("name", ["input", "weight"])
@pytest.mark.parametrize("value", [None, [1.0]])
def test_what_is_no_tensor_is_a_type_error(device, name, value):
    arguments = {"input": torch.ones(4, 6), "weight": torch.ones(6), "eps": 1e-6}
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        ops.rms_norm(**{**arguments, name: value})
