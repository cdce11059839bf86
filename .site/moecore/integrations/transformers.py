"""Run the experts of Hugging Face transformers models on moecore.

transformers (5.20 and later) lets a model choose the function behind its experts modules by name;
`register` adds the name "moecore". The function reads each module's own parameters, so loading,
saving and switching back need nothing special; `pack` gives that up to decode faster on the CPU.

Example:
    >>> moecore.integrations.transformers.register()
    >>> model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moecore")
    >>> model.generate(**inputs)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moecore import ops
from moecore._core import GroupedGemmConfig, PackedWeights
from moecore.integrations._gates import activation_of, unsupported

__all__ = ["pack", "register"]

_NAME = "moecore"
_OLDEST_TRANSFORMERS = (5, 20)
_DTYPES = frozenset({torch.float32, torch.bfloat16})
_PLAIN_TYPES = frozenset({Tensor, nn.Parameter})


@dataclass
class _Plan:
    """What one experts module computes, and its packed weights if it has any."""

    config: GroupedGemmConfig
    gate_up: PackedWeights | None = None
    down: PackedWeights | None = None


# Weak, and beside the modules rather than in them: a plan neither outlives its module nor enters
# its state_dict, pickle or copy.
_plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def register() -> None:
    """Add the experts implementation "moecore" to transformers.

    Afterwards `experts_implementation="moecore"` in `from_pretrained`, and
    `model.set_experts_implementation("moecore")`, run every experts module of the model on moecore,
    on the CPU or on CUDA. A second call changes nothing.

    Supported are gated experts with float32 or bfloat16 parameters, for inference: SiLU,
    tanh-approximated GELU, clamped SiLU (DeepSeek-V4, HY-V4, GLM-5) and the clamped SwiGLU of
    gpt-oss and MiniMax-M3. What a module computes is decided, and tried on sample values, at its
    first call. A model whose experts are not built on transformers' interface for them (Llama 4,
    DBRX) keeps its own. A forward pass raises, before it computes anything:

    - moecore.UnsupportedError for a module that is none of these; the message names its class;
    - RuntimeError if a gradient would be needed.

    Raises:
        ImportError: transformers is missing or older than 5.20.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "moecore.integrations.transformers needs transformers >= 5.20, which is not installed"
        ) from error
    if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST_TRANSFORMERS:
        raise ImportError(
            "moecore.integrations.transformers needs transformers >= 5.20, found "
            f"{transformers.__version__}"
        )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts_forward)


def pack(model: Any) -> int:
    """Pack the weights of every experts module, for faster decoding on the CPU.

    Also registers "moecore" and sets it as the model's experts implementation. The packed form
    gives the same bits. Every weight is freed as soon as it is packed, so that memory peaks at the
    model plus one tensor (of freed tensors below 32 MiB, glibc may keep the pages for what the
    process allocates next). Afterwards the modules' `gate_up_proj` and `down_proj` are empty, of
    shape [0]. On these modules state_dict, save_pretrained, training, copies and pickles no longer
    work, and no other experts implementation can run them.

    Args:
        model: a PreTrainedModel on the CPU.

    Returns:
        The number of modules packed by this call; those packed before are left alone.

    Raises:
        ValueError: the model has no experts modules.
        moecore.UnsupportedError: a module is not supported or not on the CPU. Nothing has changed.
        RuntimeError: the model does not accept the implementation. No weight has changed.
        ImportError: see `register`.
    """
    register()
    modules = [m for m in model.modules() if hasattr(m, "is_concatenated")]
    if not modules:
        raise ValueError(f"pack: {type(model).__name__} has no experts modules")
    for module in modules:
        plan = _plan_of(module)
        for name, packed in (("gate_up_proj", plan.gate_up), ("down_proj", plan.down)):
            if packed is None and _plain_weight(module, name).device.type != "cpu":
                device = getattr(module, name).device
                raise unsupported(module, f"{name} is on {device}, packed weights are for the CPU")
    model.set_experts_implementation(_NAME)
    for module in modules:
        if module.config._experts_implementation != _NAME:
            raise RuntimeError(
                f"pack: {type(model).__name__} did not accept experts_implementation={_NAME!r} "
                f"for its {type(module).__name__}"
            )
    return sum(_pack_module(module) for module in modules)


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the weighted sum of each token's experts, [T, H] of hidden_states' dtype.

    Ids at or above the module's number of experts, by which expert parallelism marks the slots of
    other ranks, add nothing. `register` lists what is raised.
    """
    plan = _plan_of(self)
    if hidden_states.dtype not in _DTYPES:
        raise unsupported(self, f"hidden_states are {hidden_states.dtype}")
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad
        or top_k_weights.requires_grad
        or any(parameter.requires_grad for parameter in self.parameters())
    ):
        raise RuntimeError(
            f"moecore computes no gradients, but {type(self).__name__} needs them: run the model "
            "under torch.no_grad() or torch.inference_mode()"
        )
    gate_up = _plain_weight(self, "gate_up_proj") if plan.gate_up is None else plan.gate_up
    down = _plain_weight(self, "down_proj") if plan.down is None else plan.down
    dtype = down.dtype if isinstance(down, Tensor) else getattr(torch, down.dtype)

    sorted_slots, slot_to_row, expert_offsets = ops.sort_by_expert(
        top_k_index.to(torch.int32).contiguous(), down.shape[0]
    )
    inner = ops.grouped_gemm(
        hidden_states.to(dtype).contiguous(),
        gate_up,
        expert_offsets,
        sorted_slots=sorted_slots,
        slots_per_token=top_k_index.shape[-1],
        bias=self.gate_up_proj_bias if self.has_bias else None,  # type: ignore[arg-type]
        config=plan.config,
    )
    rows = ops.grouped_gemm(
        inner,
        down,
        expert_offsets,
        bias=self.down_proj_bias if self.has_bias else None,  # type: ignore[arg-type]
    )
    return ops.combine(
        rows,
        slot_to_row,
        top_k_weights.to(torch.float32).contiguous(),
        out=torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
    )


def _plan_of(module: nn.Module) -> _Plan:
    plan = _plans.get(module)
    if plan is None:
        plan = _plans[module] = _Plan(activation_of(module))
    return plan


def _plain_weight(module: Any, name: str) -> Tensor:
    """Return a parameter as [E, N, K], checked at every call: casts and quantisers replace it."""
    weight: Tensor = getattr(module, name)
    if type(weight) not in _PLAIN_TYPES:
        raise unsupported(module, f"{name} is a {type(weight).__name__}")
    if weight.dtype not in _DTYPES:
        raise unsupported(module, f"{name} is {weight.dtype}")
    if weight.dim() != 3:
        raise ValueError(
            f"{type(module).__name__}: {name} must have 3 dimensions, got shape "
            f"{list(weight.shape)}; a copy of a packed model holds no weights"
        )
    return weight.transpose(1, 2) if module.is_transposed else weight


def _pack_module(module: Any) -> bool:
    plan = _plan_of(module)
    if plan.gate_up is not None and plan.down is not None:
        return False
    # Each weight is complete in one form at every moment, also if an allocation fails in between.
    if plan.gate_up is None:
        weight = _plain_weight(module, "gate_up_proj")
        plan.gate_up = ops.prepare_weights(
            weight, gated=True, interleaved=not module.is_concatenated
        )
        module.gate_up_proj.data = weight.new_empty(0)
        del weight
    if plan.down is None:
        weight = _plain_weight(module, "down_proj")
        plan.down = ops.prepare_weights(weight)
        module.down_proj.data = weight.new_empty(0)
    return True
