"""The MoE block of a decoder: router, this rank's experts, and the shared expert."""

from __future__ import annotations

from moecore.config import MoEConfig
from moecore.loading import Source, WeightSlot
from moecore.models.layers import MLP, Placement, fill_slot, one_matrix
from moecore.models.names import CheckpointNames
from moecore.moe_layer import MoELayer
from moecore.transport import Transport, expert_range

Alternatives = tuple[tuple[Source, ...], ...]


def _experts_of(transport: Transport | None, num_experts: int) -> range:
    if transport is None:
        return range(num_experts)
    return expert_range(num_experts, transport.rank, transport.size)


class MoE:
    """The router, and a MoELayer over this rank's experts of the layer's E: all, or its share."""

    def __init__(
        self,
        place: Placement,
        layer: str,
        hidden_size: int,
        moe: MoEConfig,
        names: CheckpointNames,
        transport: Transport | None,
    ) -> None:
        self._prefixes = [f"{layer}.{prefix}" for prefix in names.moe_prefixes]
        self._names = names
        self._moe = moe
        self._hidden_size = hidden_size
        self._local_experts = local = _experts_of(transport, moe.num_experts)
        num_local, inner = len(local), moe.intermediate_size
        self._router = place.matrices(1, moe.num_experts, hidden_size, gated=False)
        self.router_matrix = one_matrix(self._router)
        self._gate_up = place.matrices(num_local, 2 * inner, hidden_size, gated=True)
        self._down = place.matrices(num_local, hidden_size, inner, gated=False)
        shared_size = moe.shared_intermediate_size
        shared_prefix = f"{self._prefixes[0]}.{names.shared}"
        self._shared = MLP(place, shared_prefix, hidden_size, shared_size) if shared_size else None
        self._shared_gate = place.empty(1, hidden_size) if moe.has_shared_gate else None
        self.layer = MoELayer(
            self._gate_up,
            self._down,
            moe.routing_config(),
            num_experts=moe.num_experts,
            first_expert=local.start,
            shared_gate_up=self._shared.gate_up.matrix if self._shared else None,
            shared_down=self._shared.down.matrix if self._shared else None,
            shared_gate=self._shared_gate,
            transport=transport,
        )

    def slots(self) -> list[WeightSlot]:
        names, hidden = self._names, self._hidden_size
        experts = self._moe.num_experts
        router = self._alternatives((names.router, (experts, hidden)))
        slots = [fill_slot(router, self._router, 0)]
        for expert in range(experts):
            slots += self._expert_slots(expert)
        if self._shared is not None:
            slots += self._shared.slots()
        if self._shared_gate is not None:
            gate = self._alternatives((names.shared_gate, (1, hidden)))
            slots.append(WeightSlot(gate, self._shared_gate.copy_))
        return slots

    def _expert_slots(self, expert: int) -> list[WeightSlot]:
        names, hidden, inner = self._names, self._hidden_size, self._moe.intermediate_size
        experts = self._moe.num_experts
        index = expert - self._local_experts.start
        gate_up = self._alternatives(
            (names.expert_gate.format(e=expert), (inner, hidden)),
            (names.expert_up.format(e=expert), (inner, hidden)),
        ) + self._fused(names.fused_gate_up, (experts, 2 * inner, hidden), expert)
        down = self._alternatives(
            (names.expert_down.format(e=expert), (hidden, inner))
        ) + self._fused(names.fused_down, (experts, hidden, inner), expert)
        if expert not in self._local_experts:
            return [WeightSlot(gate_up, None), WeightSlot(down, None)]
        return [fill_slot(gate_up, self._gate_up, index), fill_slot(down, self._down, index)]

    def _alternatives(self, *parts: tuple[str, tuple[int, ...]]) -> Alternatives:
        """The same tensors under each of the prefixes that checkpoints use."""
        return tuple(
            tuple(Source(f"{prefix}.{name}", shape) for name, shape in parts)
            for prefix in self._prefixes
        )

    def _fused(self, name: str, shape: tuple[int, ...], expert: int) -> Alternatives:
        return tuple((Source(f"{p}.{name}", shape, expert=expert),) for p in self._prefixes)
