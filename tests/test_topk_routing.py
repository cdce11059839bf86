"""topk_routing against the float64 oracle, and the promises its docstring makes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from moecore import ops

EPS32 = torch.finfo(torch.float32).eps

# The routing of real models, and the edges of what the kernel accepts. `bias` is the scale of the
# random selection bias, None for no bias.
MODELS = {
    "mixtral": {"num_experts": 8, "top_k": 2},
    "qwen3": {"num_experts": 128, "top_k": 8},
    "olmoe": {"num_experts": 64, "top_k": 8, "renormalize": False},
    "gpt-oss": {"num_experts": 128, "top_k": 4, "score_function": "raw_logits"},
    "deepseek-v2": {
        "num_experts": 160,
        "top_k": 6,
        "renormalize": False,
        "scale": 16.0,
        "group_limit": "max",
        "num_groups": 8,
        "topk_group": 3,
    },
    "deepseek-v3": {
        "num_experts": 256,
        "top_k": 8,
        "bias": 0.2,
        "score_function": "sigmoid",
        "scale": 2.5,
        "norm_epsilon": 1e-20,
        "group_limit": "top2_sum",
        "num_groups": 8,
        "topk_group": 4,
    },
    "deepseek-v4": {
        "num_experts": 256,
        "top_k": 6,
        "bias": 0.2,
        "score_function": "sqrtsoftplus",
        "scale": 1.5,
    },
    "ernie-4.5": {"num_experts": 64, "top_k": 6, "bias": 0.2, "norm_min": 1e-12},
    "norm-min-reached": {"num_experts": 64, "top_k": 6, "norm_min": 0.9},
    "norm-epsilon-visible": {
        "num_experts": 64,
        "top_k": 6,
        "score_function": "sigmoid",
        "norm_epsilon": 0.5,
    },
    "one-expert": {"num_experts": 1, "top_k": 1},
    "all-experts": {"num_experts": 17, "top_k": 17},
    "ragged-last-vector": {"num_experts": 33, "top_k": 32, "score_function": "sigmoid"},
    "groups-of-one": {
        "num_experts": 12,
        "top_k": 3,
        "bias": 0.2,
        "score_function": "sigmoid",
        "group_limit": "top2_sum",
        "num_groups": 12,
        "topk_group": 5,
    },
    "largest": {"num_experts": 1024, "top_k": 32},
}


def make_logits(num_tokens, num_experts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num_tokens, num_experts, generator=generator)).to(dtype)


def route(device, logits, top_k, *, selection_bias=None, **options):
    """ops.topk_routing on `device`, its result on the CPU."""
    if selection_bias is not None:
        selection_bias = selection_bias.to(device)
    got = ops.topk_routing(logits.to(device), top_k, selection_bias=selection_bias, **options)
    return ops.Routing(got.topk_ids.cpu(), got.topk_weights.cpu())


def weights_rtol(num_experts, top_k, options):
    # In units of eps = 2**-23: rounding x - max, where |x - max| < 32, costs exp() at most 16, and
    # exp itself 1; so 34 for both sides of a division, 1/2 each for two divisions, the epsilon
    # and the scale, and (n - 1) / 2 for a sum of n positive terms. Sigmoid and sqrtsoftplus take
    # exact arguments and are below 8.
    is_full_sum = options.get("score_function", "softmax") == "softmax"
    return ((num_experts if is_full_sum else 0) + top_k + 36) * EPS32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_matches_float64_oracle(device, model, dtype):
    options = dict(model)
    num_experts, top_k = options.pop("num_experts"), options.pop("top_k")
    bias_scale = options.pop("bias", None)
    if bias_scale is not None:
        options["selection_bias"] = bias_scale * make_logits(1, num_experts, seed=1)[0] / 3
    logits = make_logits(257, num_experts, dtype)

    got = route(device, logits, top_k, **options)
    want_ids, _, gap = oracle.topk_routing(logits, top_k, **options)

    assert got.topk_ids.dtype == torch.int32
    assert got.topk_weights.dtype == torch.float32
    # Without a bias the logits themselves are compared: exact, ties included. With one, float32
    # scores of size 1 may swap two choices that lie closer than a few eps; few rows have such.
    is_clear = torch.ones(len(logits), dtype=torch.bool) if bias_scale is None else gap > 1e-5
    assert is_clear.float().mean() > 0.95
    assert torch.equal(got.topk_ids[is_clear].long(), want_ids[is_clear])
    options.pop("selection_bias", None)
    options = {k: v for k, v in options.items() if k not in ("group_limit", "num_groups")}
    options.pop("topk_group", None)
    want_weights = oracle.routing_weights(logits, got.topk_ids, **options)
    rtol = weights_rtol(num_experts, top_k, options)
    torch.testing.assert_close(got.topk_weights.double(), want_weights, rtol=rtol, atol=0)


def test_rows_of_a_wider_matrix_are_read_in_place(device):
    wide = make_logits(9, 50)
    got = route(device, wide, 4)  # for its device; the slice below keeps the stride
    part = ops.topk_routing(wide.to(device)[:, :50], 4)
    assert torch.equal(part.topk_ids.cpu(), got.topk_ids)
    inner = ops.topk_routing(wide.to(device)[:, 7:40], 4)
    want_ids, _, _ = oracle.topk_routing(wide[:, 7:40], 4)
    assert torch.equal(inner.topk_ids.cpu().long(), want_ids)


def test_a_rows_bits_do_not_depend_on_the_other_rows(device):
    logits = make_logits(200, 60)
    together = route(device, logits, 6)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    permuted = route(device, logits[order], 6)
    assert torch.equal(permuted.topk_ids, together.topk_ids[order])
    permuted_bits = oracle.bits(permuted.topk_weights)
    assert torch.equal(permuted_bits, oracle.bits(together.topk_weights)[order])
    for row in (0, 57, 199):
        alone = route(device, logits[row : row + 1], 6)
        assert torch.equal(alone.topk_ids[0], together.topk_ids[row])
        assert torch.equal(alone.topk_weights[0], together.topk_weights[row])


def test_equal_logits_go_to_the_lower_expert_id(device):
    logits = torch.zeros(3, 60)
    logits[:, [7, 41]] = 1.0
    logits[:, 0] = -0.0  # equal to 0.0, so it keeps its place
    assert route(device, logits, 4).topk_ids.tolist() == [[7, 41, 0, 1]] * 3


def test_minus_zero_equals_zero_as_a_choice_with_bias(device):
    logits = torch.full((1, 20), -math.inf)  # sigmoid 0
    bias = torch.zeros(20)
    bias[3] = -0.0
    logits[0, 19] = 0.0
    got = route(device, logits, 5, score_function="sigmoid", selection_bias=bias)
    assert got.topk_ids.tolist() == [[19, 0, 1, 2, 3]]


@pytest.mark.parametrize("group_limit", ["max", "top2_sum"])
def test_equal_groups_go_to_the_lower_group(device, group_limit):
    got = route(device, torch.zeros(2, 12), 4, group_limit=group_limit, num_groups=4, topk_group=2)
    assert got.topk_ids.tolist() == [[0, 1, 2, 3]] * 2


def test_a_group_is_as_good_as_its_best_or_its_two_best(device):
    # Group 0 has the best expert, group 1 the best pair.
    logits = torch.tensor([[4.0, 0.0, 0.0, 3.0, 3.0, 0.0]])
    options = {"score_function": "sigmoid", "num_groups": 2, "topk_group": 1}
    best = route(device, logits, 2, group_limit="max", **options)
    assert best.topk_ids.tolist() == [[0, 1]]
    pair = route(device, logits, 2, group_limit="top2_sum", **options)
    assert pair.topk_ids.tolist() == [[3, 4]]


def test_the_bias_chooses_and_does_not_weigh(device):
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    bias = torch.tensor([5.0, 0.0, 0.0])
    got = route(device, logits, 1, score_function="sigmoid", selection_bias=bias, renormalize=False)
    assert got.topk_ids.tolist() == [[0]]
    assert got.topk_weights.tolist() == [[0.5]]


def test_raw_logits_are_what_a_bias_and_a_group_sum_add_to(device):
    bias = torch.tensor([2.0, 0.0])
    options = {"score_function": "raw_logits"}
    got = route(device, torch.tensor([[0.0, 3.0]]), 1, selection_bias=bias, **options)
    assert got.topk_ids.tolist() == [[1]]
    options |= {"group_limit": "top2_sum", "num_groups": 2, "topk_group": 1}
    got = route(device, torch.tensor([[4.0, 0.0, 3.0, 3.0]]), 1, **options)
    assert got.topk_ids.tolist() == [[2]]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "raw_logits"])
def test_nan_logits_count_as_minus_inf(device, score_function):
    logits = make_logits(4, 40)
    logits[:, 3:9] = -math.inf
    with_nan = logits.clone()
    with_nan[:, 3:9] = math.nan
    want = route(device, logits, 8, score_function=score_function)
    got = route(device, with_nan, 8, score_function=score_function)
    assert torch.equal(got.topk_ids, want.topk_ids)
    assert torch.equal(got.topk_weights, want.topk_weights)


def test_a_nan_bias_counts_as_minus_inf(device):
    bias = torch.zeros(10)
    bias[:8] = math.nan
    got = route(device, torch.zeros(1, 10), 3, score_function="sigmoid", selection_bias=bias)
    assert got.topk_ids.tolist() == [[8, 9, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "raw_logits"])
def test_a_row_without_logits_gives_distinct_ids_and_nan_weights(
    device, score_function, value, dtype
):
    logits = torch.full((2, 40), value, dtype=dtype)
    logits[1, 5] = 0.0
    got = route(device, logits, 8, score_function=score_function)
    assert got.topk_ids[0].tolist() == list(range(8))
    assert got.topk_ids[1].tolist() == [5, 0, 1, 2, 3, 4, 6, 7]
    assert got.topk_weights[0].isnan().all()
    assert got.topk_weights[1].tolist() == [1.0] + [0.0] * 7


@pytest.mark.parametrize("score_function", ["softmax", "raw_logits"])
def test_plus_inf_gives_nan_weights_under_an_exponential_score(device, score_function):
    logits = torch.zeros(1, 8)
    logits[0, 6] = math.inf
    got = route(device, logits, 2, score_function=score_function)
    assert got.topk_ids.tolist() == [[6, 0]]
    assert got.topk_weights.isnan().all()


def test_plus_inf_has_sigmoid_one(device):
    logits = torch.tensor([[0.0, math.inf, 0.0]])
    got = route(device, logits, 2, score_function="sigmoid", renormalize=False)
    assert got.topk_ids.tolist() == [[1, 0]]
    assert got.topk_weights.tolist() == [[1.0, 0.5]]


def test_zero_tokens_give_empty_outputs(device):
    got = route(device, make_logits(0, 16), 2)
    assert got.topk_ids.shape == got.topk_weights.shape == (0, 2)


@pytest.mark.parametrize("top_k", [-1, 0, 17])
def test_top_k_out_of_range_names_the_argument_and_the_value(device, top_k):
    with pytest.raises(ValueError, match=rf"top_k must be in .* got {top_k} with num_experts 16"):
        route(device, make_logits(4, 16), top_k)


def test_top_k_above_32_is_refused(device):
    with pytest.raises(ValueError, match=r"top_k must be in .* got 33 with num_experts 64"):
        route(device, make_logits(4, 64), 33)


BAD_OPTIONS = {
    "scale-nan": ({"scale": math.nan}, "scale must be finite, got nan"),
    "norm-epsilon": ({"norm_epsilon": -1.0}, "norm_epsilon must be .* got -1"),
    "norm-min": ({"norm_min": math.inf}, "norm_min must be .* got inf"),
    "score-name": ({"score_function": "tanh"}, "score_function must be one of .* got tanh"),
    "group-name": ({"group_limit": "best"}, "group_limit must be one of .* got best"),
    "groups-do-not-divide": (
        {"group_limit": "max", "num_groups": 5},
        "num_groups must be a positive divisor of num_experts, got 5 with num_experts 16",
    ),
    "no-groups": ({"group_limit": "max", "num_groups": 0}, "num_groups must be .* got 0"),
    "topk-group-zero": (
        {"group_limit": "max", "num_groups": 4, "topk_group": 0},
        r"topk_group must be in \[1, num_groups\], got 0",
    ),
    "topk-group-large": (
        {"group_limit": "top2_sum", "num_groups": 4, "topk_group": 5},
        "topk_group must be in .* got 5 with num_groups 4",
    ),
    "groups-hold-too-few": (
        {"top_k": 5, "group_limit": "max", "num_groups": 4, "topk_group": 1},
        "top_k must be at most the 4 experts of topk_group groups, got 5",
    ),
    "bias-shape": (
        {"selection_bias": torch.zeros(15)},
        r"selection_bias must have shape \[16\], got .*15",
    ),
    "bias-dtype": (
        {"selection_bias": torch.zeros(16, dtype=torch.bfloat16)},
        "selection_bias must be float32, got bfloat16",
    ),
    "bias-stride": (
        {"selection_bias": torch.zeros(32)[::2]},
        r"selection_bias must be contiguous, got strides \[2\]",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_is_named_with_its_value(device, options, message):
    options = {"top_k": 2, **options}
    if "selection_bias" in options:
        options["selection_bias"] = options["selection_bias"].to(device)
        if "stride" in message:  # a copy to another device is contiguous
            options["selection_bias"] = torch.zeros(32, device=device)[::2]
    with pytest.raises(ValueError, match=message):
        ops.topk_routing(make_logits(4, 16).to(device), **options)


BAD_LOGITS = {
    "float16": (lambda x: x.half(), "router_logits must be .* got float16"),
    "int32": (lambda x: x.int(), "router_logits must be float32 or bfloat16, got int32"),
    "one-dimension": (lambda x: x[0], r"router_logits must have shape \[any, any\], got .*16"),
    "three-dimensions": (lambda x: x[None], "router_logits must have shape .* got .*1, 4, 16"),
    "no-experts": (lambda x: x[:, :0], r"num_experts must be in \[1, 1024\], got 0"),
    "too-many-experts": (lambda x: x.new_zeros(1, 1025), "num_experts must be .* got 1025"),
    "transposed": (lambda x: x.T.contiguous().T, "router_logits must have contiguous rows"),
    "every-other": (lambda x: x[:, ::2], r"router_logits must have contiguous rows.*\[16, 2\]"),
    "expanded": (lambda x: x[:1].expand(4, 16), r"router_logits must have contig.*\[0, 1\]"),
}


@pytest.mark.parametrize(("change", "message"), BAD_LOGITS.values(), ids=BAD_LOGITS.keys())
def test_bad_logits_are_named_with_what_they_are(device, change, message):
    logits = change(make_logits(4, 16).to(device))
    with pytest.raises(ValueError, match=message):
        ops.topk_routing(logits, 2)


@pytest.mark.parametrize("logits", [[[0.0, 1.0]], None, 3.0])
def test_what_is_no_tensor_is_a_type_error(logits):
    with pytest.raises(TypeError, match="router_logits must be a tensor"):
        ops.topk_routing(logits, 1)


@st.composite
def routings(draw):
    """(logits, top_k, options): any shape, with ties, infinities and NaN."""
    num_groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    group_size = draw(st.sampled_from([1, 2, 5, 16, 33]))
    num_experts = num_groups * group_size
    topk_group = draw(st.integers(1, num_groups))
    options = {
        "score_function": draw(
            st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "raw_logits"])
        ),
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "norm_epsilon": draw(st.sampled_from([0.0, 1e-20])),
        "norm_min": draw(st.sampled_from([0.0, 1e-12])),
        "group_limit": draw(st.sampled_from(["none", "max", "top2_sum"])),
        "num_groups": num_groups,
        "topk_group": topk_group,
    }
    kept = num_experts
    if options["group_limit"] != "none":
        kept = topk_group * group_size
    top_k = draw(st.integers(1, min(kept, 32)))
    # A few values repeated over the row make ties; the seed spreads them.
    value = st.one_of(
        st.floats(-20, 20, width=32), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan])
    )
    values = torch.tensor(draw(st.lists(value, min_size=1, max_size=8)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    num_tokens = draw(st.integers(0, 5))
    picks = torch.randint(len(values), (num_tokens, num_experts), generator=generator)
    logits = values[picks]
    if draw(st.booleans()):
        noise = torch.randn(num_tokens, num_experts, generator=generator)
        logits = torch.where(logits == 0, logits, logits + noise)
    if draw(st.booleans()):
        logits = logits.bfloat16()
    if draw(st.booleans()):
        options["selection_bias"] = torch.randn(num_experts, generator=generator)
    return logits, top_k, options


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(routings())
def test_any_routing_is_valid_and_sorted(device, routing):
    logits, top_k, options = routing
    got = route(device, logits, top_k, **options)
    ids = got.topk_ids.long()
    assert ids.shape == (len(logits), top_k)
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    assert all(len(set(row)) == top_k for row in ids.tolist())

    choice_options = {
        name: options.get(name)
        for name in ("score_function", "selection_bias", "group_limit", "num_groups", "topk_group")
    }
    choice, _ = oracle.choices(logits, **choice_options)
    chosen = choice.gather(1, ids)
    # float32 choices below 32 round by less than 1e-5; infinities must be in order as they are.
    assert (chosen[:, :-1] >= chosen[:, 1:] - 1e-5).all()

    want_ids, want_weights, gap = oracle.topk_routing(logits, top_k, **options)
    if options.get("selection_bias") is None and options["group_limit"] != "top2_sum":
        assert torch.equal(ids, want_ids)
    else:
        is_clear = gap > 1e-5
        assert torch.equal(ids[is_clear], want_ids[is_clear])
    same = (ids == want_ids).all(dim=1)
    # A score of 0 beside one of e**-40 is no relative error: 1e-30 is below every weight here.
    torch.testing.assert_close(
        got.topk_weights[same].double(),
        want_weights[same],
        rtol=weights_rtol(logits.shape[1], top_k, options),
        atol=1e-30,
        equal_nan=True,
    )
