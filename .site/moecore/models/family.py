"""What the configurations of the families have in common."""

from __future__ import annotations

from typing import Any

from moecore._core import UnsupportedError
from moecore.config import ConfigReader, ModelConfig, MoEConfig


def base_config(
    keys: ConfigReader,
    moe: MoEConfig,
    *,
    moe_layers: tuple[bool, ...] | None = None,
    sliding_window: int | None = None,
    default_theta: float = 1e4,
    **extra: Any,
) -> ModelConfig:
    """Read the keys that all decoders share, and check the ones that must agree."""
    keys.only("hidden_act", "silu", "silu")
    hidden_size = keys.integer("hidden_size")
    num_heads = keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", hidden_size // num_heads)
    num_kv_heads = keys.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise keys.fail("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if not 1 <= moe.top_k <= moe.num_experts:
        raise keys.fail("num_experts_per_tok", f"in [1, {moe.num_experts}]")
    num_layers = keys.integer("num_hidden_layers")
    moe_layers = moe_layers or (True,) * num_layers
    max_positions = keys.integer("max_position_embeddings")
    if sliding_window is not None and sliding_window < max_positions:
        raise UnsupportedError(
            f"sliding_window must be absent or >= max_position_embeddings ({max_positions}), "
            f"got {sliding_window}"
        )
    return ModelConfig(
        model_type=keys.get("model_type"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=keys.integer("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=keys.rope(head_dim, default_theta),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        dtype=keys.dtype(),
        eos_token_ids=keys.token_ids("eos_token_id"),
        bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
        moe=moe,
        moe_layers=moe_layers,
        intermediate_size=0 if all(moe_layers) else keys.integer("intermediate_size"),
        **extra,
    )


def sparse_layers(keys: ConfigReader, num_experts: int) -> tuple[bool, ...]:
    """Which layers hold experts: every decoder_sparse_step-th, but for mlp_only_layers."""
    step = keys.integer("decoder_sparse_step", 1)
    dense = set(keys.get("mlp_only_layers") or ())
    return tuple(
        layer not in dense and num_experts > 0 and (layer + 1) % step == 0
        for layer in range(keys.integer("num_hidden_layers"))
    )
