"""What the docstring of topk_routing promises: ties, groups, biases, NaN and infinities."""

import math

import pytest
import torch

from routing_data import make_logits, route


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
