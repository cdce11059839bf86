"""Names of a decoder's tensors in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointNames:
    """Suffixes after `model.layers.<i>.`; `{e}` stands for an expert's number.

    `moe_prefixes` are tried in order: files of transformers 4 and 5 differ for some families.
    An expert's matrices come one by one (`expert_gate`, ...) or fused over all experts
    (`fused_gate_up` [E, 2 I, H], `fused_down` [E, H, I]).
    """

    moe_prefixes: tuple[str, ...] = ("mlp",)
    router: str = "gate.weight"
    expert_gate: str = "experts.{e}.gate_proj.weight"
    expert_up: str = "experts.{e}.up_proj.weight"
    expert_down: str = "experts.{e}.down_proj.weight"
    fused_gate_up: str = "experts.gate_up_proj"
    fused_down: str = "experts.down_proj"
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate.weight"
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
