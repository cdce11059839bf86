"""grouped_gemm, linear and prepare_weights: values against the oracle, and promises about bits."""

import itertools
import math

import pytest
import torch

import moecore
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


@pytest.fixture
def any_num_threads():
    yield
    moecore.set_num_threads(0)


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
