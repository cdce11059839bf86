"""Qwen2-MoE: biases on query, key and value; a shared expert behind a sigmoid gate.

Source: the config.json of Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.
"""

from moecore.config import ConfigReader, ModelConfig, MoEConfig
from moecore.models.family import base_config, sparse_layers
from moecore.models.names import CheckpointNames

NAMES = CheckpointNames()


def read_config(keys: ConfigReader) -> ModelConfig:
    moe = MoEConfig(
        num_experts=keys.integer("num_experts", 60),
        top_k=keys.integer("num_experts_per_tok", 4),
        intermediate_size=keys.integer("moe_intermediate_size"),
        routing_class="softmax",
        routing={"renormalize": keys.boolean("norm_topk_prob", False)},
        shared_intermediate_size=keys.integer("shared_expert_intermediate_size"),
        has_shared_gate=True,
    )
    window = keys.get("sliding_window") if keys.boolean("use_sliding_window", False) else None
    return base_config(
        keys,
        moe,
        moe_layers=sparse_layers(keys, moe.num_experts),
        qkv_bias=keys.boolean("qkv_bias", True),
        sliding_window=window,
    )
