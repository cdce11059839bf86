"""Stock generate() on moecore's experts: the greedy tokens of transformers' own eager experts.

Equal tokens are asked of trained models, in which no rounding can change one (trained_models), and
in float32 of random ones.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

import trained_models
from moecore.integrations import transformers as integration
from tiny_models import MODELS, batch, build, each_model, experts_of, generate, logits
from trained_models import NUM_NEW_TOKENS, Trained


@pytest.fixture(scope="session", params=list(MODELS))
def trained(request: pytest.FixtureRequest) -> Trained:
    return trained_models.train(request.param)


def greedy(model: Any, implementation: str, trained: Trained) -> torch.Tensor:
    return generate(model, implementation, trained.prompts, NUM_NEW_TOKENS)


def test_64_greedy_tokens_of_ragged_prompts_are_those_of_eager_in_float32(
    trained: Trained, calls: Counter[torch.nn.Module]
) -> None:
    model = trained.copy(torch.float32)
    want = greedy(model, "eager", trained)
    assert torch.equal(want, trained.sequences["input_ids"])
    assert not calls
    assert torch.equal(greedy(model, "moecore", trained), want)
    assert len(calls) == MODELS[trained.name].num_moe_layers
    assert set(calls.values()) == {NUM_NEW_TOKENS}


def test_64_greedy_tokens_of_ragged_prompts_are_those_of_eager_in_bfloat16(
    trained: Trained, calls: Counter[torch.nn.Module]
) -> None:
    model = trained.copy(torch.bfloat16)
    want = greedy(model, "eager", trained)
    assert torch.equal(want, trained.sequences["input_ids"])
    assert torch.equal(greedy(model, "moecore", trained), want)
    assert integration.pack(model) == MODELS[trained.name].num_moe_layers
    assert torch.equal(greedy(model, "moecore", trained), want)
    assert len(calls) == MODELS[trained.name].num_moe_layers
    assert set(calls.values()) == {2 * NUM_NEW_TOKENS}


def test_the_tokens_come_from_the_experts(trained: Trained) -> None:
    model = trained.copy(torch.bfloat16)
    want = logits(model, "eager", trained.sequences).argmax(dim=1)
    for module in experts_of(model):
        module.down_proj.zero_()
        if module.has_bias:
            module.down_proj_bias.zero_()
    got = logits(model, "eager", trained.sequences).argmax(dim=1)
    assert (got != want).float().mean() > 0.9


def test_bfloat16_logits_are_as_exact_as_eagers_and_too_far_apart_to_change_a_token(
    trained: Trained, calls: Counter[torch.nn.Module]
) -> None:
    model = trained.copy(torch.bfloat16)
    routes: dict[str, list[torch.Tensor]] = {}

    def run(model: Any, implementation: str) -> torch.Tensor:
        taken = routes.setdefault(implementation, [])
        hooks = [
            module.register_forward_pre_hook(
                lambda _, args: taken.append(args[1].sort(dim=1).values)
            )
            for module in experts_of(model)
        ]
        result = logits(model, implementation, trained.sequences)
        for hook in hooks:
            hook.remove()
        return result

    exact = logits(copy.deepcopy(model).float(), "eager", trained.sequences)
    eager = run(model, "eager")
    got = run(model, "moecore")
    assert len(calls) == MODELS[trained.name].num_moe_layers
    # Padding tokens have routes too, of no consequence.
    is_token = trained.sequences["attention_mask"].flatten().bool()
    for mine, theirs in zip(routes["moecore"], routes["eager"], strict=True):
        assert torch.equal(mine[is_token], theirs[is_token])

    # moecore rounds an expert's rows twice and the sum of a token once; eager rounds gate, up, the
    # activation, the product, the row, its weighing and every addition.
    assert 0 < (got - exact).norm() <= 1.05 * (eager - exact).norm()
    # A chain of some 20 roundings in each of 3 layers, of eps / 2 and random signs, with gains near
    # 1: sqrt(64) eps / 2.
    eps = torch.finfo(torch.bfloat16).eps
    assert (got - exact).norm() <= 4 * eps * exact.norm()
    best = eager.topk(2, dim=1).values
    is_followed = torch.zeros_like(trained.sequences["input_ids"], dtype=torch.bool)
    is_followed[:, -NUM_NEW_TOKENS - 1 : -1] = True
    followed = is_followed[trained.sequences["attention_mask"].bool()]
    assert (best[:, 0] - best[:, 1])[followed].min() > 4 * (got - eager).abs().max()


@each_model
def test_random_models_give_the_tokens_of_eager_in_float32(
    name: str, calls: Counter[torch.nn.Module]
) -> None:
    model = build(name)
    inputs = batch()
    got = generate(model, "moecore", inputs)
    assert got.shape == (2, 12 + 16)
    assert set(calls.values()) == {16}
    assert len(calls) == MODELS[name].num_moe_layers
    assert torch.equal(got, generate(model, "eager", inputs))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3", "GptOss"])
def test_generate_from_one_prompt(name: str) -> None:
    model = build(name)
    inputs = {key: value[:1] for key, value in batch().items()}
    assert torch.equal(generate(model, "moecore", inputs), generate(model, "eager", inputs))
