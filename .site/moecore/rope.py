"""Tables of the rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moecore.config import RopeConfig


def cos_sin_table(rope: RopeConfig, num_positions: int, max_position_embeddings: int) -> Tensor:
    """Return [num_positions, rotary_dim] float32: cosines in the first half of the columns."""
    inv_freq, magnitude = _frequencies(rope, max_position_embeddings)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * magnitude


def _frequencies(rope: RopeConfig, max_position_embeddings: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    inv_freq = 1.0 / rope.theta**exponents
    kind = rope.scaling.get("rope_type", "default")
    if kind == "linear":
        return inv_freq / float(rope.scaling["factor"]), 1.0
    if kind == "yarn":
        return _yarn(rope, inv_freq, max_position_embeddings)
    return inv_freq, 1.0


def _yarn(rope: RopeConfig, inv_freq: Tensor, max_positions: int) -> tuple[Tensor, float]:
    """Interpolate low frequencies by `factor`, keep high ones, blend between.

    Source: YaRN (arXiv 2309.00071), sections 3.2 to 3.4, with the constants of transformers.
    """
    scaling: Mapping[str, Any] = rope.scaling
    original = int(scaling.get("original_max_position_embeddings") or max_positions)
    factor = float(scaling.get("factor") or max_positions / original)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = magnitude(float(mscale)) / magnitude(float(mscale_all))
        else:
            attention_factor = magnitude(1.0)

    def dimension_of(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        turns = math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
        return rope.rotary_dim * turns

    low = dimension_of(float(scaling.get("beta_fast") or 32))
    high = dimension_of(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    keep = 1 - ramp.clamp(0, 1)
    return inv_freq / factor * (1 - keep) + inv_freq * keep, float(attention_factor)
