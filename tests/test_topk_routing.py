"""topk_routing against the float64 oracle: real models, and any routing at all."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from moecore import ops
from routing_data import make_logits, route, weights_rtol

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


def test_zero_tokens_give_empty_outputs(device):
    got = route(device, make_logits(0, 16), 2)
    assert got.topk_ids.shape == got.topk_weights.shape == (0, 2)


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
