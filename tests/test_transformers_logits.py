"""Logits of tiny models on moecore's experts, against transformers' own eager experts."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from tiny_models import HIDDEN, MODELS, OTHER_MODELS, batch, build, each_model, experts_of, logits


@pytest.mark.parametrize("name", [*MODELS, *OTHER_MODELS])
def test_logits_match_eager_in_float32(name: str, calls: Counter[torch.nn.Module]) -> None:
    model = build(name)
    num_moe_layers = (MODELS | OTHER_MODELS)[name].num_moe_layers
    want = logits(model, "eager")
    assert not calls
    got = logits(model, "moecore")
    assert calls == Counter(experts_of(model))
    assert len(calls) == num_moe_layers
    # Rounding errors of a float32 sum of K terms of random signs add up to about sqrt(K) eps of the
    # result, here in two orders, for the two products of an expert; a layer passes an error on with
    # a gain near 1. Norms average over thousands of them.
    eps = torch.finfo(torch.float32).eps
    bound = num_moe_layers * 2 * 2 * HIDDEN**0.5 * eps
    assert (got - want).norm() <= bound * want.norm()


def record_routing(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    routings: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in experts_of(model):
        module.register_forward_pre_hook(lambda _, args: routings.append(args[1:]))
    return routings


def replay_routing(model: Any, routings: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for module, (ids, weights) in zip(experts_of(model), routings, strict=True):
        module.register_forward_pre_hook(
            lambda _, args, ids=ids, weights=weights: (args[0], ids, weights.to(args[2].dtype))
        )


@each_model
def test_logits_are_as_exact_as_eager_in_bfloat16(
    name: str, calls: Counter[torch.nn.Module]
) -> None:
    model = build(name, torch.bfloat16)
    exact_model = copy.deepcopy(model).float()
    routings = record_routing(exact_model)
    exact = logits(exact_model, "eager")
    # All three runs take the routes of the first: a rounding that flips a near tie would otherwise
    # send a token to another expert, an error that says nothing of the experts' arithmetic.
    replay_routing(model, routings)
    eager_error = (logits(model, "eager") - exact).norm()
    error = (logits(model, "moecore") - exact).norm()
    assert calls == Counter(experts_of(model))
    assert error > 0
    # The errors are those of some thousand roundings; moecore makes fewer of them than eager.
    assert error <= 1.1 * eager_error


def test_a_model_in_training_mode_of_autograd_is_refused(
    calls: Counter[torch.nn.Module],
) -> None:
    model = build("Mixtral")
    model.set_experts_implementation("moecore")
    with pytest.raises(RuntimeError, match="MixtralExperts needs them"):
        model(**batch())
