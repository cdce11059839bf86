"""MoELayer: routing, sorting, both grouped GEMMs and the combine behind one call."""

from __future__ import annotations

import torch
from torch import Tensor

from moecore import _core
from moecore._core import GroupedGemmConfig, PackedWeights, RoutingConfig
from moecore.transport import Transport

_SWIGLU = GroupedGemmConfig(activation="swiglu")


class MoELayer:
    """One mixture-of-experts layer on one device.

    Computes, for each token x with its router logits::

        ids, weights = topk_routing(logits)
        expert(x)    = activation(x @ gate_up.T + gate_up_bias) @ down.T + down_bias
        output       = sum over j of weights[j] * expert[ids[j]](x)  + shared expert(x)

    Holds references to its weights, not copies. One call runs at a time; its scratch memory grows
    to the largest T seen. A token's output bits do not depend on the other tokens.

    Args:
        gate_up: [E_local, 2 I, H] float32 or bfloat16, or `prepare_weights(..., gated=True)`.
        down: [E_local, H, I] of the same dtype, or `prepare_weights` of it.
        routing: RoutingConfig; how logits become experts and weights.
        activation: GroupedGemmConfig of a gated activation, SwiGLU by default.
        num_experts: E over all ranks (default: E_local).
        first_expert: global id of this rank's first expert; slots of other ranks add nothing.
        gate_up_bias: [E_local, 2 I] of float32 or the weights' dtype.
        down_bias: [E_local, H], likewise.
        selection_bias: [E] float32; see `ops.topk_routing`.
        shared_gate_up: [2 S, H], with shared_down [H, S]: an expert that every token visits.
        shared_down: see shared_gate_up.
        shared_gate: [1, H]: scales the shared output by sigmoid(x @ shared_gate.T) (Qwen2-MoE).
        transport: this rank's Transport: the other experts are on its other ranks. Every call is
            then collective; each rank gives its own tokens (T may differ, and be 0), and all ranks
            call their layers in the same order.
        combine: "exact" (the bits of one rank with all experts, for every number of ranks) or
            "fast" (each rank adds its own experts first: fewer bytes, other bits).
        schedule: "all_to_all" (a token goes where its experts are), "all_gather" (every token goes
            everywhere, in fixed shapes) or "auto" (the cheaper by `transport.figures`).
        num_groups: stages of the pipeline that overlaps communication with the local experts, the
            same on every rank (default: chosen by cost).
        fixed_tokens: with "all_gather", the largest T of any rank: no host exchange precedes a call
            then, and after a first call it can be captured in a CUDA graph.

    Attributes:
        native: the layer as a decoder layer of the core takes it.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the message names the weight.

    Example:
        >>> layer = moecore.MoELayer(gate_up, down, moecore.ops.RoutingConfig(top_k=2))
        >>> y = layer(hidden_states, router_logits)
    """

    def __init__(
        self,
        gate_up: Tensor | PackedWeights,
        down: Tensor | PackedWeights,
        routing: RoutingConfig,
        *,
        activation: GroupedGemmConfig = _SWIGLU,
        num_experts: int | None = None,
        first_expert: int = 0,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        selection_bias: Tensor | None = None,
        shared_gate_up: Tensor | PackedWeights | None = None,
        shared_down: Tensor | PackedWeights | None = None,
        shared_gate: Tensor | None = None,
        transport: Transport | None = None,
        combine: str = "exact",
        schedule: str = "auto",
        num_groups: int | None = None,
        fixed_tokens: int | None = None,
    ) -> None:
        if len(down.shape) != 3:
            raise ValueError(f"MoELayer: down must have 3 dimensions, got shape {list(down.shape)}")
        num_local_experts, hidden_size, intermediate_size = down.shape
        weights = {
            "gate_up": gate_up,
            "down": down,
            "gate_up_bias": gate_up_bias,
            "down_bias": down_bias,
            "selection_bias": selection_bias,
            "shared_gate_up": shared_gate_up,
            "shared_down": shared_down,
            "shared_gate": shared_gate,
        }
        self.native = _core.MoELayer(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_local_experts if num_experts is None else num_experts,
            first_expert=first_expert,
            num_local_experts=num_local_experts,
            routing=routing,
            activation=activation,
            shared_intermediate_size=0 if shared_down is None else shared_down.shape[-1],
            dtype=str(down.dtype).removeprefix("torch."),
            weights={name: tensor for name, tensor in weights.items() if tensor is not None},
            transport=None if transport is None else transport.native,
            combine=combine,
            schedule=schedule,
            num_groups=num_groups or 0,
            fixed_tokens=fixed_tokens or 0,
        )

    def __call__(
        self, hidden_states: Tensor, router_logits: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: [T, H] of the weights' dtype; T may be 0.
            router_logits: [T, E] float32 or bfloat16.
            out: [T, H] of the weights' dtype, overlapping no input (default: new).

        Returns:
            `out`.

        Raises:
            ValueError: a shape, dtype, stride or device does not hold; the message names it.
        """
        out = torch.empty_like(hidden_states) if out is None else out
        self.native.forward(hidden_states, router_logits, out)
        return out

    def forward_routed(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run the layer on a routing made elsewhere.

        Args:
            hidden_states: [T, H] of the weights' dtype; T may be 0.
            topk_ids: [T, k] int32 global ids; those of other ranks and negative ones add nothing.
            topk_weights: [T, k] float32.
            out: [T, H] of the weights' dtype, overlapping no input (default: new).

        Returns:
            `out`.

        Raises:
            ValueError: a shape, dtype, stride or device does not hold; the message names it.
        """
        out = torch.empty_like(hidden_states) if out is None else out
        self.native.forward_routed(hidden_states, topk_ids, topk_weights, out)
        return out
