"""How large a model is: parameters, bytes and memory per rank, without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, prod

from moecore.checkpoint import Checkpoint
from moecore.config import ModelConfig

# Routed experts only: a shared expert is named shared_expert or shared_experts.
_EXPERTS = re.compile(r"\.experts\.")


@dataclass(frozen=True)
class Size:
    """Of routed experts, which expert parallelism shares out, and of the rest."""

    experts: int
    rest: int

    @property
    def total(self) -> int:
        return self.experts + self.rest


def count_parameters(config: ModelConfig) -> Size:
    """Count the parameters that a config.json implies."""
    hidden, moe = config.hidden_size, config.moe
    query, kv = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    attention = hidden * (query + 2 * kv) + query * hidden
    attention += (query + 2 * kv) * config.qkv_bias + hidden * config.output_bias
    attention += {"none": 0, "per_head": 2 * config.head_dim, "full_width": query + kv}[
        config.qk_norm
    ]
    shared = 3 * hidden * moe.shared_intermediate_size + hidden * moe.has_shared_gate
    moe_layers = sum(config.moe_layers)
    dense_layers = config.num_layers - moe_layers
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return Size(
        experts=moe_layers * moe.num_experts * 3 * hidden * moe.intermediate_size,
        rest=embeddings
        + config.num_layers * (attention + 2 * hidden)
        + moe_layers * (moe.num_experts * hidden + shared)
        + dense_layers * 3 * hidden * config.intermediate_size
        + hidden,
    )


def active_parameters(size: Size, config: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts that are not chosen for it."""
    return size.rest + size.experts * config.moe.top_k // config.moe.num_experts


def checkpoint_parameters(checkpoint: Checkpoint) -> Size:
    """Count the parameters in a checkpoint's headers."""
    return _sum(checkpoint, {name: prod(info.shape) for name, info in checkpoint.tensors.items()})


def checkpoint_bytes(checkpoint: Checkpoint) -> Size:
    """Count the bytes in a checkpoint's headers."""
    return _sum(checkpoint, {name: info.nbytes for name, info in checkpoint.tensors.items()})


def bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of a checkpoint by dtype, most first."""
    result: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        result[info.dtype] = result.get(info.dtype, 0) + info.nbytes
    return dict(sorted(result.items(), key=lambda item: -item[1]))


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token takes in the cache, over all layers, in the model's dtype."""
    width = 2 * config.num_kv_heads * config.head_dim
    return config.num_layers * width * config.dtype.itemsize


def bytes_per_rank(size: Size, num_experts: int, ep_size: int) -> int:
    """Weights of the fullest of ep_size ranks: its share of the experts, and all of the rest."""
    return size.rest + size.experts * ceil(num_experts / ep_size) // num_experts


def _sum(checkpoint: Checkpoint, amounts: dict[str, int]) -> Size:
    experts = sum(amount for name, amount in amounts.items() if _EXPERTS.search(name))
    return Size(experts, sum(amounts.values()) - experts)
