"""pack: the same bits from packed weights, and what it refuses."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

import moecore
from moecore.integrations import transformers as integration
from tiny_models import MODELS, build, each_dtype, each_model, experts_of, logits

pytestmark = pytest.mark.usefixtures("calls")


@each_model
@each_dtype
def test_pack_gives_the_same_bits(
    name: str, dtype: torch.dtype, calls: Counter[torch.nn.Module]
) -> None:
    model = build(name, dtype)
    want = logits(model, "moecore")
    model.set_experts_implementation("eager")
    calls.clear()
    assert integration.pack(model) == MODELS[name].num_moe_layers
    assert model.config._experts_implementation == "moecore"
    for module in experts_of(model):
        assert module.gate_up_proj.shape == module.down_proj.shape == (0,)
    assert torch.equal(logits(model, "moecore"), want)
    assert calls == Counter(experts_of(model))
    assert integration.pack(model) == 0


def test_pack_refuses_a_model_without_experts() -> None:
    with pytest.raises(ValueError, match="Linear has no experts modules"):
        integration.pack(torch.nn.Linear(2, 2))


def test_pack_changes_nothing_if_a_module_is_unsupported() -> None:
    model = build("Mixtral")
    model.set_experts_implementation("eager")
    modules = experts_of(model)
    modules[-1].act_fn = torch.nn.ReLU()
    with pytest.raises(moecore.UnsupportedError, match="MixtralExperts: the activation is ReLU"):
        integration.pack(model)
    assert all(module.down_proj.dim() == 3 for module in modules)
    assert model.config._experts_implementation == "eager"


def test_pack_refuses_weights_that_are_not_on_the_cpu() -> None:
    model = build("Mixtral")
    experts_of(model)[-1].to("meta")
    with pytest.raises(moecore.UnsupportedError, match="MixtralExperts: gate_up_proj is on meta"):
        integration.pack(model)
    assert experts_of(model)[0].gate_up_proj.dim() == 3


def test_a_copy_of_a_packed_model_says_that_it_has_no_weights() -> None:
    model = build("Mixtral")
    integration.pack(model)
    with pytest.raises(ValueError, match="MixtralExperts: gate_up_proj must have 3 dimensions"):
        logits(copy.deepcopy(model), "moecore")
