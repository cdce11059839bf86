"""What no op may do with strange input: crash, write elsewhere, or be silently wrong."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moecore
from moecore import ops

# T = 4 rows, K = H = 8, N = 6, G = E = 2.
T, K, N, G = 4, 8, 6, 2


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slots(device="cpu"):
    return torch.tensor([0, 1, 2, 3], dtype=torch.int32, device=device)


# Every tensor argument of every op, by name; "out" too where it can be passed.
CALLS = {
    "topk_routing": (
        lambda a: ops.topk_routing(a["router_logits"], 1, selection_bias=a["selection_bias"]),
        {"router_logits": (T, K), "selection_bias": (K,)},
    ),
    "sort_by_expert": (
        lambda a: ops.sort_by_expert(a["topk_ids"], G),
        {"topk_ids": slots().view(T, 1)},
    ),
    "grouped_gemm": (
        lambda a: ops.grouped_gemm(
            a["input"],
            a["weights"],
            a["expert_offsets"],
            sorted_slots=a["sorted_slots"],
            bias=a["bias"],
            out=a["output"],
        ),
        {
            "input": (T, K),
            "weights": (G, N, K),
            "expert_offsets": torch.tensor([0, 2, 4]),
            "sorted_slots": slots(),
            "bias": (G, N),
            "output": (T, N),
        },
    ),
    "linear": (
        lambda a: ops.linear(a["input"], a["weight"], a["bias"], out=a["output"]),
        {"input": (T, K), "weight": (N, K), "bias": (N,), "output": (T, N)},
    ),
    "combine": (
        lambda a: ops.combine(
            a["expert_rows"],
            a["slot_to_row"],
            a["topk_weights"],
            shared_output=a["shared_output"],
            shared_scale=a["shared_scale"],
            out=a["output"],
        ),
        {
            "expert_rows": (T, K),
            "slot_to_row": slots(),
            "topk_weights": (T, 1),
            "shared_output": (T, K),
            "shared_scale": (T,),
            "output": (T, K),
        },
    ),
}
ARGUMENTS = [(op, name) for op, (_, shapes) in CALLS.items() for name in shapes]


def make_arguments(op):
    return {
        name: value if isinstance(value, torch.Tensor) else randn(*value, seed=i)
        for i, (name, value) in enumerate(CALLS[op][1].items())
    }


def call(op, **changed):
    return CALLS[op][0]({**make_arguments(op), **changed})


@pytest.mark.parametrize("op", CALLS)
def test_the_arguments_of_these_tests_are_good(op):
    call(op)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
def test_an_argument_of_an_unknown_dtype_is_named(op, name, dtype):
    value = make_arguments(op)[name].to(dtype)
    with pytest.raises(ValueError, match=f"^{op}: {name} must be .*, got "):
        call(op, **{name: value})


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
@pytest.mark.parametrize("kind", ["meta", "sparse", "fake", "five-dimensions"])
def test_a_tensor_without_plain_memory_is_named(op, name, kind):
    value = make_arguments(op)[name]
    if kind == "meta":
        value = value.to("meta")
    elif kind == "sparse":
        value = value.to_sparse()
    elif kind == "fake":
        with FakeTensorMode():
            value = torch.zeros(value.shape, dtype=value.dtype)
    else:
        value = value.view(*[1] * (5 - value.dim()), *value.shape)
    if op in ("topk_routing", "sort_by_expert") and kind in ("meta", "fake"):
        pytest.skip("the outputs, made like this input, are what is refused")
    with pytest.raises(ValueError, match=f"^{op}: {name} must "):
        call(op, **{name: value})


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_an_array_that_runs_backwards_is_named(op, name):
    value = make_arguments(op)[name].numpy()
    for axis in range(value.ndim):
        if value.shape[axis] == 1:
            continue
        backwards = np.flip(value, axis)
        with pytest.raises(ValueError, match=f"^{op}: {name} must .*(contiguous|stride)"):
            call(op, **{name: backwards})


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_matrix_whose_rows_share_memory_is_named_unless_it_is_weights(op, name):
    value = make_arguments(op)[name]
    shared = value[:1].expand(value.shape)
    if name in ("weight", "weights"):  # only read, at its own strides
        plain = value[:1].repeat(value.shape[0], *[1] * (value.dim() - 1))
        assert torch.equal(call(op, **{name: shared}), call(op, **{name: plain}))
        return
    with pytest.raises(ValueError, match=f"^{op}: {name} must .*contiguous"):
        call(op, **{name: shared})


@pytest.mark.parametrize("op", ["grouped_gemm", "linear", "combine"])
def test_an_output_that_is_part_of_an_input_is_refused_and_nothing_is_written(op):
    for name, value in make_arguments(op).items():
        if name == "output" or value.dtype != torch.float32 or name == "shared_output":
            continue
        width = make_arguments(op)["output"].shape[1]
        memory = randn(T * width + value.numel(), seed=9)
        inside = memory[: value.numel()].view(value.shape)
        output = memory[value.numel() - 1 :][: T * width].view(T, width)  # one element in common
        before = memory.clone()
        with pytest.raises(ValueError, match=f"^{op}: output must not overlap {name}"):
            call(op, **{name: inside, "output": output})
        assert torch.equal(memory, before)
        beside = memory[value.numel() :][: T * width].view(T, width)
        call(op, **{name: inside, "output": beside})


def test_a_read_only_output_is_named():
    output = np.zeros((T, N), np.float32)
    output.flags.writeable = False
    with pytest.raises(ValueError, match="^linear: output must be .* got numpy.ndarray"):
        call("linear", output=output)
    assert not output.any()


def test_numpy_arrays_are_taken_where_tensors_are():
    good = {name: value.numpy() for name, value in make_arguments("linear").items()}
    call("linear", **good)
    assert torch.equal(torch.from_numpy(good["output"]), call("linear"))


@pytest.mark.parametrize(
    ("num_groups", "n", "k_dim"), [(1, 2**32, 2**32), (2**40, 64, 2**20), (2**62, 1, 4)]
)
def test_packed_weights_beyond_any_memory_are_refused(num_groups, n, k_dim):
    with pytest.raises(ValueError, match=r"num_groups \* n \* k_dim must be at most 2\^48, got"):
        ops.PackedWeights("float32", num_groups, n, k_dim, False)


def make_layer(num_experts=2, top_k=1, hidden=8, inter=4, **kwargs):
    return moecore.MoELayer(
        randn(num_experts, 2 * inter, hidden, seed=1),
        randn(num_experts, hidden, inter, seed=2),
        ops.RoutingConfig(top_k=top_k),
        **kwargs,
    )


def test_a_layer_checks_its_inputs_before_it_takes_memory_for_them():
    layer = make_layer()
    many = 2**30
    out = torch.zeros(1, 8).expand(many, 8)
    with pytest.raises(ValueError, match="hidden_states must have contiguous rows"):
        layer(randn(1, 8).expand(many, 8), randn(1, 2).expand(many, 2), out=out)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[any, 8\], got"):
        layer(randn(1, 1).expand(many, 1), randn(4, 2), out=randn(4, 8))
    with pytest.raises(ValueError, match=r"output must have shape \[4, 8\], got"):
        layer(randn(4, 8), randn(4, 2), out=torch.zeros(5, 8))


@pytest.mark.parametrize("name", ["router_logits", "down_bias", "gate_up_bias"])
def test_a_layers_output_is_no_part_of_what_it_reads(name):
    biases = {"gate_up_bias": randn(2, 8), "down_bias": randn(2, 8)}
    layer = make_layer(**biases)
    logits = randn(4, 2)
    out = {**biases, "router_logits": logits}[name].view(-1)[:8].view(1, 8)
    with pytest.raises(ValueError, match=f"output must not overlap {name}"):
        layer(randn(1, 8), logits[:1], out=out)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_of_useless_logits_stays_in_its_row(device, value):
    gate_up, down = randn(6, 8, 8, seed=1).to(device), randn(6, 8, 4, seed=2).to(device)
    layer = moecore.MoELayer(gate_up, down, ops.RoutingConfig(top_k=3))
    x, logits = randn(5, 8, seed=3).to(device), randn(5, 6, seed=4).to(device)
    want = layer(x, logits)
    logits[2] = value
    got = layer(x, logits)
    assert got[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_tokens"),
    [(1, 1, 3), (5, 5, 3), (32, 32, 2), (1024, 32, 3), (1024, 1, 1), (7, 3, 0)],
)
@pytest.mark.parametrize(("hidden", "inter"), [(1, 1), (17, 3)])
def test_a_layer_at_the_limits_is_the_sum_of_its_experts(
    device, num_experts, top_k, num_tokens, hidden, inter
):
    gate_up = randn(num_experts, 2 * inter, hidden, seed=1)
    down = randn(num_experts, hidden, inter, seed=2)
    x, logits = randn(num_tokens, hidden, seed=3), randn(num_tokens, num_experts, seed=4)
    layer = moecore.MoELayer(gate_up.to(device), down.to(device), ops.RoutingConfig(top_k=top_k))
    got = layer(x.to(device), logits.to(device)).cpu()

    values, ids = logits.double().topk(top_k, dim=1)
    weights = values.softmax(dim=1)
    gate, up = torch.einsum("th,tkih->tki", x.double(), gate_up.double()[ids]).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    want = torch.einsum("tk,tki,tkhi->th", weights, inner, down.double()[ids])
    # Sums of at most 17 * 3 * 32 products of numbers below 50, a dozen roundings each.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and moecore.build_info()["has_cuda"]),
    reason="needs a GPU and a build with CUDA kernels",
)


@needs_cuda
@pytest.mark.parametrize("offsets", [[-5, 2, 4], [0, 2, 4000], [0, 3, 1], [9, 9, 9]])
def test_on_cuda_offsets_out_of_range_write_no_other_memory(offsets):
    arguments = {n: v.cuda() for n, v in make_arguments("grouped_gemm").items()}
    memory = torch.full((3 * T, N), 5.0, device="cuda")
    arguments["output"] = memory[T : 2 * T]
    arguments["expert_offsets"] = torch.tensor(offsets, device="cuda")
    call("grouped_gemm", **arguments)
    assert memory[:T].eq(5).all()
    assert memory[2 * T :].eq(5).all()


@needs_cuda
def test_on_cuda_slots_and_rows_out_of_range_count_as_zeros():
    wild = torch.tensor([0, -7, 2**31 - 1, 3], dtype=torch.int32, device="cuda")
    x, weights = randn(T, K).cuda(), randn(1, N, K).cuda()
    offsets = torch.tensor([0, T], device="cuda")
    got = ops.grouped_gemm(x, weights, offsets, sorted_slots=wild)
    want = ops.linear(x, weights[0])
    assert torch.equal(got[[0, 3]], want[[0, 3]])
    assert got[1:3].eq(0).all()

    got = ops.combine(x, wild, torch.ones(T, 1, device="cuda"))
    assert torch.equal(got[[0, 3]], x[[0, 3]])
    assert got[1:3].eq(0).all()
