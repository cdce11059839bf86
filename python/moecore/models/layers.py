"""Parts of a decoder: each owns its weights and says which checkpoint tensors fill them.

On the CPU weights are packed for the kernels while they load, elsewhere they are plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecore.loading import Packing, Source, WeightSlot
from moecore.ops import PackedWeights


@dataclass(frozen=True)
class Placement:
    """Where weights live and in which dtype."""

    device: torch.device
    dtype: torch.dtype

    @property
    def packs(self) -> bool:
        return self.device.type == "cpu"

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def matrices(self, groups: int, n: int, k: int, *, gated: bool) -> Tensor | PackedWeights:
        """Room for `groups` weights [n, k] in the form that the device's kernels read best."""
        if not self.packs:
            return self.empty(groups, n, k)
        return PackedWeights(str(self.dtype).removeprefix("torch."), groups, n, k, gated)


def one_matrix(weight: Tensor | PackedWeights) -> Tensor | PackedWeights:
    """Return weights of one group as `ops.linear` takes them."""
    return weight if isinstance(weight, PackedWeights) else weight[0]


def fill(target: Tensor | PackedWeights, group: int, parts: Sequence[Tensor]) -> None:
    """Put one matrix, given as row blocks, into `target`; a gated one as gate and up."""
    if isinstance(target, PackedWeights):
        if not target.gated:
            target.pack(group, parts[0] if len(parts) == 1 else torch.cat(list(parts)))
        else:
            gate, up = parts if len(parts) == 2 else parts[0].chunk(2)
            target.pack_gated(group, gate, up)
        return
    row = 0
    for part in parts:
        target[group, row : row + part.shape[0]].copy_(part)
        row += part.shape[0]


def fill_slot(
    alternatives: tuple[tuple[Source, ...], ...], target: Tensor | PackedWeights, group: int
) -> WeightSlot:
    """The slot of one matrix of `target`, as `fill` takes it."""
    packing = Packing(target, group) if isinstance(target, PackedWeights) else None
    return WeightSlot(alternatives, lambda *parts: fill(target, group, parts), packing=packing)


class Parameter:
    """One tensor taken as it is."""

    def __init__(self, place: Placement, name: str, *shape: int) -> None:
        self.name = name
        self.value = place.empty(*shape)

    def slots(self) -> list[WeightSlot]:
        shape = tuple(self.value.shape)
        return [WeightSlot(((Source(self.name, shape),),), self.value.copy_)]


class Linear:
    """A weight stacked from one or more checkpoint tensors, with its bias; or gate and up."""

    def __init__(
        self,
        place: Placement,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        gated: bool = False,
    ) -> None:
        self._in_features = in_features
        self._parts = parts  # checkpoint prefix -> rows
        rows = sum(parts.values())
        self.weight = place.matrices(1, rows, in_features, gated=gated)
        self.matrix = one_matrix(self.weight)
        self.bias = place.empty(rows) if bias else None

    def slots(self) -> list[WeightSlot]:
        weights = tuple(
            Source(f"{name}.weight", (rows, self._in_features))
            for name, rows in self._parts.items()
        )
        slots = [fill_slot((weights,), self.weight, 0)]
        if self.bias is not None:
            biases = tuple(Source(f"{name}.bias", (rows,)) for name, rows in self._parts.items())
            slots.append(WeightSlot((biases,), self._load_bias))
        return slots

    def _load_bias(self, *parts: Tensor) -> None:
        assert self.bias is not None
        self.bias.copy_(torch.cat(list(parts)))


class MLP:
    """down(silu(gate(x)) * up(x)): the dense layers of a model that also has experts."""

    def __init__(self, place: Placement, prefix: str, hidden_size: int, inner: int) -> None:
        self.gate_up = Linear(
            place,
            hidden_size,
            {f"{prefix}.gate_proj": inner, f"{prefix}.up_proj": inner},
            gated=True,
        )
        self.down = Linear(place, inner, {f"{prefix}.down_proj": hidden_size})

    def slots(self) -> list[WeightSlot]:
        return [*self.gate_up.slots(), *self.down.slots()]
