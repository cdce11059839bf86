"""One experts module on moecore: what it computes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20")

from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import moecore
from tiny_models import EXPERTS, HIDDEN, INNER, TOP_K

pytestmark = pytest.mark.usefixtures("calls")


class _Config:
    _experts_implementation = "moecore"


class _Experts(torch.nn.Module):
    """Experts as transformers models define them, with what a test wants changed."""

    def __init__(
        self, config: _Config, *, act: str = "silu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        generator = torch.Generator().manual_seed(2)
        for name, shape in (
            ("gate_up_proj", (EXPERTS, 2 * INNER, HIDDEN)),
            ("down_proj", (EXPERTS, HIDDEN, INNER)),
        ):
            weight = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            self.register_parameter(name, torch.nn.Parameter(weight.to(dtype), requires_grad=False))
        self.act_fn = ACT2FN[act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError


def _experts(changes: dict[str, Any] | None = None, flags: Any = None, **settings: Any) -> Any:
    """An instance of a subclass of _Experts of its own, since the decorator changes its class."""
    subclass = type("TinyExperts", (_Experts,), changes or {})
    decorated = use_experts_implementation(**flags or {})(subclass)
    return decorated(_Config(), **settings)


def _routed(num_tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    scores, ids = torch.rand(num_tokens, EXPERTS, generator=generator).topk(TOP_K)
    return hidden, ids, scores


def _close_to_batched_mm(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    got = module(*inputs)
    want = ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *inputs)
    assert got.dtype == inputs[0].dtype
    assert got.shape == inputs[0].shape
    # The bound of one layer in the float32 test of whole models.
    assert (got - want).norm() <= 4 * HIDDEN**0.5 * torch.finfo(torch.float32).eps * want.norm()


@pytest.mark.parametrize("act", ["silu", "swish", "gelu_pytorch_tanh"])
def test_activations(act: str) -> None:
    _close_to_batched_mm(_experts(act=act), _routed())


def test_transposed_weights() -> None:
    module = _experts()
    transposed = _experts(flags={"is_transposed": True})
    for weight in transposed.parameters():
        weight.data = weight.data.transpose(1, 2).contiguous()
    assert torch.equal(transposed(*_routed()), module(*_routed()))


def test_no_tokens() -> None:
    assert _experts()(*_routed(0)).shape == (0, HIDDEN)


def test_sentinel_ids_add_nothing() -> None:
    module = _experts()
    module._is_expert_parallel = True
    hidden, ids, weights = _routed()
    ids[0, 1], ids[3] = EXPERTS, EXPERTS
    weights = weights.masked_fill(ids == EXPERTS, 0.0)
    _close_to_batched_mm(module, (hidden, ids, weights))
    assert not module(hidden, ids, weights)[3].any()


def test_strided_and_low_precision_inputs() -> None:
    module = _experts()
    hidden, ids, weights = _routed()
    strided = torch.stack([hidden, hidden], dim=2)[..., 0]
    assert not strided.is_contiguous()
    want = module(hidden, ids, weights.bfloat16().float())
    got = module(strided, ids.T.contiguous().T, weights.bfloat16())
    assert torch.equal(got, want)


def test_float32_states_meet_bfloat16_weights() -> None:
    module = _experts(dtype=torch.bfloat16)
    hidden, ids, weights = _routed()
    got = module(hidden.bfloat16().float(), ids, weights)
    assert got.dtype == torch.float32
    assert torch.equal(got.bfloat16(), module(hidden.bfloat16(), ids, weights))


def _own_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.chunk(2, dim=-1)[0]


def _own_silu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * (1 + 1e-4)


class _LouderSilu(torch.nn.SiLU):
    forward = staticmethod(_own_silu)


def _with_activation(activation: Any) -> Any:
    module = _experts()
    del module.act_fn  # a module, in whose place torch accepts no function
    module.act_fn = activation
    return module


@pytest.mark.parametrize(
    ("module", "what"),
    [
        pytest.param(lambda: _experts(act="gelu"), "the activation is GELUActivation", id="gelu"),
        pytest.param(
            lambda: _experts({"_apply_gate": _own_gate}), "the gate is .*_own_gate", id="gate"
        ),
        pytest.param(
            lambda: _with_activation(_LouderSilu()), "computes something else than", id="belied"
        ),
        pytest.param(
            lambda: _with_activation(_own_silu), "the activation is _own_silu", id="function"
        ),
        pytest.param(
            lambda: _experts(flags={"is_concatenated": False}), "is_concatenated=False", id="layout"
        ),
        pytest.param(lambda: _experts(flags={"has_gate": False}), "have no gate", id="no-gate"),
        pytest.param(
            lambda: _experts(flags={"has_post_expert_norm": True}),
            "has_post_expert_norm",
            id="norm",
        ),
        pytest.param(
            lambda: _experts(dtype=torch.float16), "gate_up_proj is torch.float16", id="float16"
        ),
        pytest.param(
            lambda: _experts(dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn", id="float8"
        ),
    ],
)
def test_unsupported_modules_are_named(module: Any, what: str) -> None:
    with pytest.raises(
        moecore.UnsupportedError, match=rf"TinyExperts: .*{what}.*set_experts_implementation\("
    ):
        module()(*_routed())


def test_float16_states_are_unsupported() -> None:
    hidden, ids, weights = _routed()
    with pytest.raises(moecore.UnsupportedError, match="TinyExperts: hidden_states are torch"):
        _experts()(hidden.half(), ids, weights)


def test_tensor_subclasses_are_unsupported() -> None:
    class Quantised(torch.Tensor):
        pass

    module = _experts()
    del module.down_proj
    module.down_proj = torch.zeros(EXPERTS, HIDDEN, INNER).as_subclass(Quantised)
    with pytest.raises(moecore.UnsupportedError, match="TinyExperts: down_proj is a Quantised"):
        module(*_routed())


def test_a_cast_after_the_first_call_is_noticed() -> None:
    module = _experts()
    module(*_routed())
    with pytest.raises(moecore.UnsupportedError, match="gate_up_proj is torch"):
        module.half()(*_routed())


@pytest.mark.parametrize("source", ["parameter", "states", "weights"])
def test_gradients_are_refused(source: str) -> None:
    module = _experts()
    hidden, ids, weights = _routed()
    {"parameter": module.down_proj, "states": hidden, "weights": weights}[source].requires_grad_()
    with pytest.raises(RuntimeError, match=r"TinyExperts needs them.*torch\.no_grad\(\)"):
        module(hidden, ids, weights)
    with torch.no_grad():
        module(hidden, ids, weights)
    with torch.inference_mode():
        module(hidden, ids, weights)
