"""MoELayer: values against the oracle, and promises about bits, expert ranges and messages."""

import math

import pytest
import torch

import moecore
import oracle
from moecore import ops

HIDDEN, INTER, SHARED, EXPERTS, TOP_K = 72, 40, 56, 12, 3

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
SWIGLU = {"activation": "swiglu"}
LAYERS = {
    "mixtral": {},
    "gelu": {"activation": {"activation": "gelu_tanh"}},
    "gpt-oss": {
        "activation": {"activation": "clamped_swiglu", "interleaved": True},
        "biases": ("gate_up_bias", "down_bias"),
        "routing": {"score_function": "raw_logits"},
    },
    "deepseek-v3": {
        "biases": ("shared_gate_up", "shared_down", "selection_bias"),
        "routing": {
            "score_function": "sigmoid",
            "scale": 2.5,
            "norm_epsilon": 1e-20,
            "group_limit": "top2_sum",
            "num_groups": 4,
            "topk_group": 2,
        },
    },
    "qwen2-moe": {
        "biases": ("shared_gate_up", "shared_down", "shared_gate"),
        "routing": {"renormalize": False},
    },
}


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def make_weights(dtype, optional=()):
    """gate_up, down and those named in `optional`."""
    inner_scale, outer_scale = 2 / math.sqrt(HIDDEN), 1 / math.sqrt(INTER)
    weights = {
        "gate_up": randn(EXPERTS, 2 * INTER, HIDDEN, dtype=dtype, seed=1, scale=inner_scale),
        "down": randn(EXPERTS, HIDDEN, INTER, dtype=dtype, seed=2, scale=outer_scale),
        "gate_up_bias": randn(EXPERTS, 2 * INTER, dtype=dtype, seed=3),
        "down_bias": randn(EXPERTS, HIDDEN, dtype=dtype, seed=4),
        "selection_bias": randn(EXPERTS, seed=5, scale=0.1),
        "shared_gate_up": randn(2 * SHARED, HIDDEN, dtype=dtype, seed=6, scale=inner_scale),
        "shared_down": randn(HIDDEN, SHARED, dtype=dtype, seed=7, scale=outer_scale),
        "shared_gate": randn(1, HIDDEN, dtype=dtype, seed=8, scale=inner_scale),
    }
    return {n: w for n, w in weights.items() if n in ("gate_up", "down") or n in optional}


def prepare(weights, activation):
    """The weights with every matrix prepared that may be."""
    prepared = dict(weights)
    interleaved = activation.get("interleaved", False)
    for name, is_gated in {"gate_up": True, "shared_gate_up": True, "down": False}.items():
        if name in weights:
            weight = weights[name] if weights[name].dim() == 3 else weights[name][None]
            prepared[name] = ops.prepare_weights(
                weight, gated=is_gated, interleaved=is_gated and interleaved
            )
    if "shared_down" in weights:
        prepared["shared_down"] = ops.prepare_weights(weights["shared_down"][None])
    return prepared


def make_layer(weights, *, device="cpu", activation=SWIGLU, routing=None, **kwargs):
    weights = {
        name: weight.to(device) if device and isinstance(weight, torch.Tensor) else weight
        for name, weight in weights.items()
    }
    routing = ops.RoutingConfig(top_k=TOP_K, **(routing or {}))
    activation = ops.GroupedGemmConfig(**activation)
    gate_up, down = weights.pop("gate_up"), weights.pop("down")
    return moecore.MoELayer(gate_up, down, routing, activation=activation, **weights, **kwargs)


def make_inputs(num_tokens, dtype, device="cpu"):
    x = randn(num_tokens, HIDDEN, dtype=dtype, seed=9).to(device)
    return x, randn(num_tokens, EXPERTS, seed=10, scale=2.0).to(device)


def on_cpu(routing):
    return [part.cpu() for part in routing]


def assert_same_bits(got, want):
    assert torch.equal(oracle.bits(got), oracle.bits(want))


def assert_matches(got, hidden_states, topk_ids, topk_weights, weights, **options):
    matrices = {name: w for name, w in weights.items() if name != "selection_bias"}
    want, error = oracle.moe_layer(hidden_states, topk_ids, topk_weights, **matrices, **options)
    excess = (got.cpu().double() - want).abs() - error
    assert (excess <= 0).all(), f"off by {excess.max().item():.3g} more than the bound"


@pytest.mark.parametrize("num_tokens", [1, 5, 67])
@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS.keys())
@DTYPES
def test_matches_the_oracle(device, dtype, spec, num_tokens):
    activation, routing = spec.get("activation", SWIGLU), spec.get("routing", {})
    weights = make_weights(dtype, spec.get("biases", ()))
    layer = make_layer(weights, device=device, activation=activation, routing=routing)
    x, logits = make_inputs(num_tokens, dtype, device)
    got = layer(x, logits)
    assert got.dtype == dtype
    assert got.shape == x.shape

    bias = weights.get("selection_bias")
    bias = None if bias is None else bias.to(device)
    routed = ops.topk_routing(logits, TOP_K, selection_bias=bias, **routing)
    assert_matches(got, x.cpu(), *on_cpu(routed), weights, activation=activation)
    assert_same_bits(layer.forward_routed(x, *routed), got)
    if device == "cpu":
        prepared = make_layer(prepare(weights, activation), activation=activation, routing=routing)
        assert_same_bits(prepared(x, logits), got)


def test_bfloat16_logits_route_as_the_op_does(device):
    layer = make_layer(make_weights(torch.bfloat16), device=device)
    x, logits = make_inputs(9, torch.bfloat16, device)
    logits = logits.bfloat16()
    routed = ops.topk_routing(logits, TOP_K)
    assert_same_bits(layer(x, logits), layer.forward_routed(x, *routed))


@DTYPES
def test_the_layer_is_its_ops_in_bits(device, dtype):
    weights = {name: w.to(device) for name, w in make_weights(dtype).items()}
    x, logits = make_inputs(31, dtype, device)
    routed = ops.topk_routing(logits, TOP_K)
    slots = ops.sort_by_expert(routed.topk_ids, EXPERTS)
    inner = ops.grouped_gemm(
        x,
        weights["gate_up"],
        slots.expert_offsets,
        sorted_slots=slots.sorted_slots,
        slots_per_token=TOP_K,
        config=ops.GroupedGemmConfig(activation="swiglu"),
    )
    rows = ops.grouped_gemm(inner, weights["down"], slots.expert_offsets)
    want = ops.combine(rows, slots.slot_to_row, routed.topk_weights)
    assert_same_bits(make_layer(weights, device=device)(x, logits), want)


@DTYPES
def test_no_tokens_give_an_empty_output(device, dtype):
    layer = make_layer(make_weights(dtype, ("shared_gate_up", "shared_down")), device=device)
    assert layer(*make_inputs(0, dtype, device)).shape == (0, HIDDEN)
    x, logits = make_inputs(4, dtype, device)
    assert layer(x, logits).shape == (4, HIDDEN)


@DTYPES
def test_all_tokens_may_go_to_the_same_experts(device, dtype):
    weights = make_weights(dtype)
    layer = make_layer(weights, device=device)
    x, _ = make_inputs(50, dtype, device)
    ids = torch.tensor([[7, 0, 11]], dtype=torch.int32).repeat(50, 1)
    topk_weights = randn(50, TOP_K, seed=11).softmax(dim=1)
    got = layer.forward_routed(x, ids.to(device), topk_weights.to(device))
    assert_matches(got, x.cpu(), ids, topk_weights, weights, activation=SWIGLU)


@DTYPES
def test_a_tokens_bits_do_not_depend_on_the_other_tokens(device, dtype):
    optional = ("shared_gate_up", "shared_down", "shared_gate")
    layer = make_layer(make_weights(dtype, optional), device=device)
    x, logits = make_inputs(130, dtype, device)
    together = layer(x, logits)
    for num_tokens in (1, 2, 3, 7, 13, 64):
        assert_same_bits(layer(x[:num_tokens], logits[:num_tokens]), together[:num_tokens])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(12)).to(device)
    assert_same_bits(layer(x[order], logits[order]), together[order])


def test_the_result_does_not_depend_on_earlier_calls(device):
    weights = make_weights(torch.float32)
    layer = make_layer(weights, device=device)
    x, logits = make_inputs(64, torch.float32, device)
    layer(x.flip(0), logits)  # leaves its rows in the scratch memory
    fresh = make_layer(weights, device=device)
    assert_same_bits(layer(x[:5], logits[:5]), fresh(x[:5], logits[:5]))


@pytest.mark.parametrize("num_tokens", [16, 40])
@DTYPES
def test_a_rank_adds_only_its_own_experts(device, dtype, num_tokens):
    weights = make_weights(dtype)
    x, logits = make_inputs(num_tokens, dtype, device)
    routed = ops.topk_routing(logits, TOP_K)
    ids, topk_weights = on_cpu(routed)
    halves = []
    for first, last in ((0, 5), (5, EXPERTS)):
        part = {name: weight[first:last] for name, weight in weights.items()}
        layer = make_layer(part, device=device, num_experts=EXPERTS, first_expert=first)
        half = layer(x, logits)
        options = {"activation": SWIGLU, "first_expert": first}
        assert_matches(half, x.cpu(), ids, topk_weights, part, **options)
        is_foreign = ((ids < first) | (ids >= last)).all(dim=1)
        assert is_foreign.any()
        assert half.cpu()[is_foreign].eq(0).all()
        # Ids of other ranks may as well be -1.
        is_local = (routed.topk_ids >= first) & (routed.topk_ids < last)
        own = routed.topk_ids.masked_fill(~is_local, -1)
        assert_same_bits(layer.forward_routed(x, own, routed.topk_weights), half)
        halves.append(half.double())
    whole = make_layer(weights, device=device)(x, logits)
    # Each half and the whole round their outputs once more than the oracle's one rounding.
    want, error = oracle.moe_layer(x.cpu(), ids, topk_weights, **weights, activation=SWIGLU)
    assert_matches(whole, x.cpu(), ids, topk_weights, weights, activation=SWIGLU)
    magnitude = sum(half.abs() for half in halves).cpu()
    excess = (sum(halves).cpu() - want).abs() - error - torch.finfo(dtype).eps * magnitude
    assert (excess <= 0).all()


def test_writes_to_out(device):
    layer = make_layer(make_weights(torch.float32), device=device)
    x, logits = make_inputs(4, torch.float32, device)
    out = torch.empty_like(x)
    assert layer(x, logits, out=out) is out
    assert_same_bits(out, layer(x, logits))
    with pytest.raises(ValueError, match="output must not overlap hidden_states"):
        layer(x, logits, out=x)


OPTIONAL = (
    "gate_up_bias",
    "down_bias",
    "selection_bias",
    "shared_gate_up",
    "shared_down",
    "shared_gate",
)


@pytest.mark.parametrize("name", ["gate_up", *OPTIONAL])
def test_a_weight_of_the_wrong_shape_is_named(device, name):
    weights = make_weights(torch.float32, OPTIONAL)
    make_layer(weights, device=device)
    shape = list(weights[name].shape)
    wrong = weights[name][:, :-1] if name == "shared_gate" else weights[name][:-1]
    weights[name] = wrong.contiguous()
    want = str(shape).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=rf"MoELayer: {name} must have shape {want}, got"):
        make_layer(weights, device=device)


@pytest.mark.parametrize("name", ["gate_up", "shared_gate_up", "shared_down", "shared_gate"])
def test_a_weight_of_the_wrong_dtype_is_named(device, name):
    weights = make_weights(torch.float32, OPTIONAL)
    weights[name] = weights[name].bfloat16()
    with pytest.raises(ValueError, match=f"MoELayer: {name} must be float32, got bfloat16"):
        make_layer(weights, device=device)


@pytest.mark.parametrize("name", ["gate_up_bias", "down_bias", "selection_bias"])
def test_a_bias_of_the_wrong_dtype_is_named(device, name):
    weights = make_weights(torch.float32, OPTIONAL)
    weights[name] = weights[name].bfloat16()
    with pytest.raises(ValueError, match=f"MoELayer: {name} must be float32, got bfloat16"):
        make_layer(weights, device=device)


@pytest.mark.parametrize("name", ["gate_up", "down", *OPTIONAL[:-1]])
def test_a_weight_whose_elements_are_not_contiguous_is_named(device, name):
    weights = make_weights(torch.float32, OPTIONAL)
    weights = {other: weight.to(device) for other, weight in weights.items()}
    weights[name] = weights[name].repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match=f"MoELayer: {name} must .*contiguous.*, got strides"):
        make_layer(weights, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("name", ["down", *OPTIONAL])
def test_a_weight_on_another_device_is_named(name):
    weights = make_weights(torch.float32, OPTIONAL)
    weights[name] = weights[name].cuda()
    with pytest.raises(ValueError, match=f"MoELayer: {name} must be on cpu, got cuda:0"):
        make_layer(weights, device=None)


def test_prepared_weights_must_be_gated_where_the_layer_is():
    weights = make_weights(torch.float32)
    gate_up, down = ops.prepare_weights(weights["gate_up"]), ops.prepare_weights(weights["down"])
    with pytest.raises(ValueError, match="gate_up must be packed with gated = true, got .* false"):
        make_layer({**weights, "gate_up": gate_up})
    make_layer({**weights, "down": down})
    down = ops.prepare_weights(weights["down"], gated=True)
    with pytest.raises(ValueError, match="down must be packed with gated = false, got .* true"):
        make_layer({**weights, "down": down})


def test_a_bad_configuration_is_named():
    weights = make_weights(torch.float32)
    with pytest.raises(ValueError, match="down must have 3 dimensions, got shape"):
        make_layer({**weights, "down": weights["down"][0]})
    with pytest.raises(ValueError, match="activation must be a gated one, got none"):
        make_layer(weights, activation={"activation": "none"})
    with pytest.raises(ValueError, match="first_expert and .* 12 experts, got 1 and 12"):
        make_layer(weights, first_expert=1)
    with pytest.raises(ValueError, match="first_expert and .* 12 experts, got -1 and 12"):
        make_layer(weights, first_expert=-1)
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        make_layer(weights, routing={"scale": math.inf})
    with pytest.raises(ValueError, match="shared_gate must come with a shared expert, got none"):
        make_layer(make_weights(torch.float32, ("shared_gate",)))
    with pytest.raises(ValueError, match="shared_gate_up must be given, got none"):
        make_layer(make_weights(torch.float32, ("shared_down",)))


BAD_INPUTS = {
    "columns": (
        lambda x, logits: (x[:, :70].contiguous(), logits),
        rf"hidden_states must have shape \[any, {HIDDEN}\], got .*4, 70",
    ),
    "dtype": (
        lambda x, logits: (x.bfloat16(), logits),
        "hidden_states must be float32, got bfloat16",
    ),
    "transposed": (
        lambda x, logits: (x.T.contiguous().T, logits),
        "must have contiguous rows",
    ),
    "logits-tokens": (
        lambda x, logits: (x, logits[:3]),
        rf"router_logits must have shape \[4, {EXPERTS}\], got .*3, {EXPERTS}",
    ),
    "logits-experts": (
        lambda x, logits: (x, logits[:, :8].contiguous()),
        rf"router_logits must have shape \[4, {EXPERTS}\], got .*4, 8",
    ),
    "logits-dtype": (
        lambda x, logits: (x, logits.half()),
        "router_logits must be .* got float16",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_a_bad_input_is_named_with_what_it_is(device, change, message):
    layer = make_layer(make_weights(torch.float32), device=device)
    with pytest.raises(ValueError, match=message):
        layer(*change(*make_inputs(4, torch.float32, device)))


def test_a_bad_routing_is_named_with_what_it_is(device):
    layer = make_layer(make_weights(torch.float32), device=device)
    x, logits = make_inputs(4, torch.float32, device)
    ids, topk_weights = ops.topk_routing(logits, TOP_K)
    with pytest.raises(ValueError, match=r"topk_ids must have shape \[4, 3\], got .*4, 2"):
        layer.forward_routed(x, ids[:, :2].contiguous(), topk_weights)
    with pytest.raises(ValueError, match="topk_ids must be int32, got int64"):
        layer.forward_routed(x, ids.long(), topk_weights)
    with pytest.raises(ValueError, match="topk_weights must be float32, got bfloat16"):
        layer.forward_routed(x, ids, topk_weights.bfloat16())
    with pytest.raises(TypeError, match="topk_ids must be a tensor"):
        layer.forward_routed(x, None, topk_weights)


def test_an_output_inside_the_weights_is_refused():
    gate_up, down = torch.ones(2, 8, 4), torch.ones(2, 4, 4)
    layer = moecore.MoELayer(gate_up, down, ops.RoutingConfig(top_k=1))
    with pytest.raises(ValueError, match="output must not overlap down"):
        layer(torch.ones(4, 4), torch.ones(4, 2), out=down[0])
    assert (down == 1).all()
