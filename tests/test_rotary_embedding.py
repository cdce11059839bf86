"""rotary_embedding: both orders of pairs to the bit, and what it refuses."""

import pytest
import torch

import oracle
from moecore import ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def make_problem(num_tokens, num_heads, head_dim, rotary_dim, dtype):
    generator = torch.Generator().manual_seed(head_dim)
    angles = 100 * torch.randn(50, rotary_dim // 2, generator=generator)
    return (
        torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype),
        torch.randint(0, 50, (num_tokens,), generator=generator, dtype=torch.int32),
        torch.cat([angles.cos(), angles.sin()], dim=1),
    )


def emulated(x, positions, cos_sin, interleaved):
    """The promised float32 steps: a product of two float32 is exact in float64.

    The fused multiply-add's one rounding is the float64 sum's, then float32's; the two differ from
    one about once in 2**29 sums, which none of the inputs here meets.
    """
    rotary_dim = cos_sin.shape[1]
    cos, sin = (t[:, None, :].double() for t in cos_sin[positions.long()].chunk(2, dim=1))
    turned = x[..., :rotary_dim].double()
    a, b = oracle.pair_of(turned, interleaved)

    def product(x, y):
        return (x * y).float().double()

    turned_a = (a * cos + product(b, -sin)).float()
    turned_b = (b * cos + product(a, sin)).float()
    if interleaved:
        turned = torch.stack([turned_a, turned_b], dim=-1).flatten(-2)
    else:
        turned = torch.cat([turned_a, turned_b], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got.cpu()), oracle.bits(want.cpu()))


@PAIRS
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(64, 64), (128, 128), (80, 32), (96, 96), (2, 2), (20, 18), (64, 36)],
)
@DTYPES
def test_turns_pairs_in_float32_and_rounds_once(device, dtype, head_dim, rotary_dim, interleaved):
    x, positions, cos_sin = make_problem(23, 3, head_dim, rotary_dim, dtype)
    got = x.clone().to(device)
    result = ops.rotary_embedding(
        got, positions.to(device), cos_sin.to(device), interleaved=interleaved
    )
    assert result is got
    assert_same_bits(got, emulated(x, positions, cos_sin, interleaved))
    # The emulation itself against the formula: three roundings of terms of at most |a| + |b|.
    want = oracle.rotary_embedding(x, positions, cos_sin, interleaved)
    magnitude = oracle.rotary_embedding(x.abs(), positions, cos_sin, interleaved, absolute=True)
    error = oracle.rounded(want, 2 * oracle.EPS32 * magnitude, dtype)
    assert ((got.cpu().double() - want).abs() <= error).all()


@PAIRS
@DTYPES
def test_a_slice_of_a_fused_projection_is_turned_in_place(device, dtype, interleaved):
    x, positions, cos_sin = make_problem(9, 4, 32, 32, dtype)
    fused = torch.full((9, 200), 5.0, dtype=dtype, device=device)
    heads = fused[:, 16:144].unflatten(1, (4, 32))
    heads.copy_(x)
    ops.rotary_embedding(heads, positions.to(device), cos_sin.to(device), interleaved=interleaved)
    assert_same_bits(heads.contiguous(), emulated(x, positions, cos_sin, interleaved))
    assert fused[:, :16].eq(5).all()
    assert fused[:, 144:].eq(5).all()


def test_no_tokens_and_no_heads_are_fine(device):
    _, positions, cos_sin = (t.to(device) for t in make_problem(3, 2, 8, 8, torch.float32))
    assert ops.rotary_embedding(torch.empty(0, 2, 8, device=device), positions[:0], cos_sin).shape
    assert ops.rotary_embedding(torch.empty(3, 0, 8, device=device), positions, cos_sin).shape


@pytest.mark.parametrize("position", [-1, 50, 2**31 - 1])
def test_on_the_cpu_a_position_outside_is_named(position):
    x, positions, cos_sin = make_problem(4, 2, 8, 8, torch.float32)
    positions[2] = position
    with pytest.raises(
        ValueError, match=rf"positions must be in \[0, 50\).* {position} at token 2"
    ):
        ops.rotary_embedding(x, positions, cos_sin)


BAD_ARGUMENTS = {
    "x-dtype": (lambda a: {"x": a["x"].double()}, "x must be .* got float64|x must be .*float 64"),
    "x-2d": (lambda a: {"x": a["x"][0]}, r"x must have shape \[any, any, any\], got .*2, 8"),
    "x-transposed": (lambda a: {"x": a["x"].mT.contiguous().mT}, "x must have contiguous rows"),
    "positions-dtype": (lambda a: {"positions": a["positions"].long()}, "positions must be int32"),
    "positions-size": (
        lambda a: {"positions": a["positions"][:3]},
        r"positions must have shape \[4\], got .*3",
    ),
    "table-dtype": (lambda a: {"cos_sin": a["cos_sin"].bfloat16()}, "cos_sin must be float32"),
    "table-odd": (
        lambda a: {"cos_sin": a["cos_sin"][:, :7].contiguous()},
        r"cos_sin must have an even number of columns in \[2, 8\].* got 7",
    ),
    "table-wide": (
        lambda a: {"cos_sin": a["cos_sin"].repeat(1, 2)},
        r"even number of columns in \[2, 8\].* got 16",
    ),
    "table-none": (lambda a: {"cos_sin": a["cos_sin"][:, :0]}, r"in \[2, 8\].* got 0"),
    "table-is-x": (
        lambda a: {"cos_sin": a["x"].view(8, 8)},
        "x must not overlap cos_sin",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named_with_what_it_is(device, change, message):
    tensors = make_problem(4, 2, 8, 8, torch.float32)
    good = dict(zip(("x", "positions", "cos_sin"), (t.to(device) for t in tensors), strict=True))
    ops.rotary_embedding(**good)
    with pytest.raises(ValueError, match=f"rotary_embedding: .*({message})"):
        ops.rotary_embedding(**{**good, **change(good)})


@pytest.mark.parametrize("name", ["x", "positions", "cos_sin"])
def test_what_is_no_tensor_is_a_type_error(name):
    tensors = make_problem(4, 2, 8, 8, torch.float32)
    arguments = dict(zip(("x", "positions", "cos_sin"), tensors, strict=True))
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        ops.rotary_embedding(**{**arguments, name: None})
