"""What an experts module of transformers does between its two products, as the core names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moecore import ops
from moecore._core import GroupedGemmConfig, UnsupportedError


def unsupported(module: nn.Module, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"moecore cannot run {type(module).__name__}: {what}; supported are gated experts (silu, "
        "gelu_pytorch_tanh, clamped silu, gpt-oss) in float32 or bfloat16. Use "
        'model.set_experts_implementation("eager")'
    )


def activation_of(module: Any) -> GroupedGemmConfig:
    """Return the activation of an experts module.

    The gate function is known by name, and then computed once on sample values: a release of
    transformers, or a user, may have changed what is behind the name.

    Raises:
        moecore.UnsupportedError: the core has no such activation; the message names the class.
    """
    if not module.has_gate:
        raise unsupported(module, "the experts have no gate")
    if module.has_post_expert_norm:
        raise unsupported(module, "a norm follows each expert (has_post_expert_norm)")
    gate = getattr(module._apply_gate, "__func__", module._apply_gate)
    name = f"{getattr(gate, '__module__', '')}.{getattr(gate, '__qualname__', repr(gate))}"
    if name not in _GATES:
        raise unsupported(module, f"the gate is {name}")
    if module.is_concatenated == (name == _GPT_OSS):
        raise unsupported(module, f"is_concatenated={module.is_concatenated} belies its gate")
    config = _GATES[name](module)
    _check(module, config, name)
    return config


def _plain(module: Any) -> GroupedGemmConfig:
    from transformers.activations import GELUTanh

    activation = module.act_fn
    if _is_silu(activation):
        return GroupedGemmConfig(activation="swiglu")
    if isinstance(activation, GELUTanh) or (
        isinstance(activation, nn.GELU) and activation.approximate == "tanh"
    ):
        return GroupedGemmConfig(activation="gelu_tanh")
    raise _unknown_activation(module)


def _clamped_silu(module: Any) -> GroupedGemmConfig:
    if not _is_silu(getattr(module, "act_fn", nn.functional.silu)):
        raise _unknown_activation(module)
    limit = module.limit if hasattr(module, "limit") else module.swiglu_limit
    return GroupedGemmConfig(activation="clamped_swiglu", alpha=1.0, limit=limit, up_offset=0.0)


def _minimax_m3(module: Any) -> GroupedGemmConfig:
    return GroupedGemmConfig(
        activation="clamped_swiglu", alpha=module.swiglu_alpha, limit=module.swiglu_limit
    )


def _gpt_oss(module: Any) -> GroupedGemmConfig:
    return GroupedGemmConfig(
        activation="clamped_swiglu", interleaved=True, alpha=module.alpha, limit=module.limit
    )


_MODELS = "transformers.models"
_GPT_OSS = f"{_MODELS}.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate"
_GATES: dict[str, Callable[[Any], GroupedGemmConfig]] = {
    "transformers.integrations.moe._default_apply_gate": _plain,
    f"{_MODELS}.beam.modeling_beam.BeamExperts._apply_gate": _plain,
    f"{_MODELS}.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts._apply_gate": _clamped_silu,
    f"{_MODELS}.glm5_next.modeling_glm5_next.Glm5NextTextExperts._apply_gate": _clamped_silu,
    f"{_MODELS}.hy_v4.modeling_hy_v4.HYV4Experts._apply_gate": _clamped_silu,
    f"{_MODELS}.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": _minimax_m3,
    _GPT_OSS: _gpt_oss,
}


def _is_silu(activation: Any) -> bool:
    from transformers.activations import SiLUActivation

    return isinstance(activation, (nn.SiLU, SiLUActivation)) or activation is nn.functional.silu


def _unknown_activation(module: Any) -> UnsupportedError:
    activation = module.act_fn
    name = getattr(activation, "__name__", type(activation).__name__)
    return unsupported(module, f"the activation is {name}")


def _check(module: Any, config: GroupedGemmConfig, name: str) -> None:
    """Raise unless the module's own gate computes `config`, on a grid of gates and ups."""
    values = torch.cat([torch.linspace(-3, 3, 13), torch.tensor([-200.0, -15.0, 15.0, 200.0])])
    pairs = torch.cartesian_prod(values, values)
    gate_up = (pairs.T if module.is_concatenated else pairs).reshape(1, -1)
    with torch.no_grad():
        want = module._apply_gate(gate_up)
        got = ops.linear(torch.ones(1, 1), gate_up.T.contiguous(), config=config)
    # Both are some ten roundings of terms up to |gate| (|up| + 1), and exp(x) is off by |x| eps,
    # which is lost in the sigmoid where x is above 15. 1e-5 is eighty eps.
    scale = pairs[:, 0].abs() * (pairs[:, 1].abs() + 1)
    if want.shape != got.shape or ((got - want).abs() > 1e-5 * scale).any():
        raise unsupported(module, f"{name} computes something else than moecore knows by this name")
