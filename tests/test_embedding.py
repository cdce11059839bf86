"""embedding: rows bit for bit, out of plain and of packed weights, and what it refuses."""

import pytest
import torch

import oracle
from moecore import ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def make_weight(rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[0, 0] = -0.0
    weight[-1, -1] = float("nan")
    return weight


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got.cpu()), oracle.bits(want.cpu()))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 7), (65, 64), (200, 33), (130, 1100)])
@DTYPES
def test_copies_rows_bit_for_bit(device, dtype, rows, columns, ids_dtype):
    weight = make_weight(rows, columns, dtype)
    ids = torch.cat([torch.arange(rows), torch.zeros(3, dtype=torch.int64)]).flip(0).to(ids_dtype)
    got = ops.embedding(ids.to(device), weight.to(device))
    assert got.dtype == dtype
    assert_same_bits(got, weight[ids.long()])
    if device == "cpu":
        packed = ops.prepare_weights(weight[None])
        assert_same_bits(ops.embedding(ids, packed), weight[ids.long()])
        out = torch.empty(len(ids), columns, dtype=dtype)
        packed.rows(ids, out)
        assert_same_bits(out, weight[ids.long()])


@DTYPES
def test_weights_and_outputs_may_be_slices_of_wider_matrices(device, dtype):
    wide = make_weight(20, 50, dtype).to(device)
    ids = torch.tensor([3, 19, 0], device=device)
    out = torch.full((3, 60), 5.0, dtype=dtype, device=device)
    ops.embedding(ids, wide[:, 7:47], out[:, 10:50])
    assert_same_bits(out[:, 10:50].contiguous(), wide[ids, 7:47])
    assert out[:, :10].eq(5).all()
    assert out[:, 50:].eq(5).all()


def test_no_ids_give_an_empty_output(device):
    ids = torch.empty(0, dtype=torch.int64, device=device)
    assert ops.embedding(ids, torch.ones(4, 6, device=device)).shape == (0, 6)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("id", [-1, 6, 2**40])
def test_on_the_cpu_an_id_outside_is_named(packed, id):
    weight = torch.ones(6, 4)
    ids = torch.tensor([0, id, 2])
    with pytest.raises(ValueError, match=rf"embedding: ids must be in \[0, 6\).* {id} at token 1"):
        ops.embedding(ids, ops.prepare_weights(weight[None]) if packed else weight)


BAD_ARGUMENTS = {
    "ids-dtype": (lambda a: {"ids": a["ids"].float()}, "ids must be int32 or int64, got float32"),
    "ids-2d": (lambda a: {"ids": a["ids"][None]}, r"ids must have shape \[any\], got .*1, 3"),
    "ids-strided": (lambda a: {"ids": a["ids"].repeat(2)[::2]}, "ids must be contiguous"),
    "weight-dtype": (lambda a: {"weight": a["weight"].int()}, "weight must be float32 or bfloat16"),
    "weight-1d": (lambda a: {"weight": a["weight"][0]}, r"weight must have shape \[any, any\]"),
    "weight-transposed": (
        lambda a: {"weight": a["weight"].T.contiguous().T},
        "weight must have contiguous rows",
    ),
    "weight-no-columns": (lambda a: {"weight": a["weight"][:, :0]}, "at least one column"),
    "out-dtype": (lambda a: {"out": a["out"].bfloat16()}, "output must be float32, got bfloat16"),
    "out-shape": (
        lambda a: {"out": a["out"][:2]},
        r"output must have shape \[3, 4\], got .*2, 4",
    ),
    "out-is-weight": (lambda a: {"out": a["weight"][:3]}, "output must not overlap weight"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_bad_argument_is_named_with_what_it_is(device, change, message):
    good = {
        "ids": torch.tensor([0, 5, 2], device=device),
        "weight": torch.ones(6, 4, device=device),
        "out": torch.empty(3, 4, device=device),
    }
    ops.embedding(**good)
    with pytest.raises(ValueError, match=f"embedding: {message}|embedding: .*{message}"):
        ops.embedding(**{**good, **change(good)})


@pytest.mark.parametrize(("groups", "gated"), [(2, False), (1, True)])
def test_packed_weights_of_experts_are_refused(groups, gated):
    packed = ops.prepare_weights(torch.ones(groups, 6, 4), gated=gated)
    with pytest.raises(ValueError, match="weight must hold one group that is not gated, got"):
        ops.embedding(torch.tensor([0]), packed)


@pytest.mark.parametrize("name", ["ids", "weight"])
def test_what_is_no_tensor_is_a_type_error(name):
    arguments = {"ids": torch.tensor([0]), "weight": torch.ones(6, 4)}
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        ops.embedding(**{**arguments, name: None})
