"""Qwen3-MoE: query and key normalised per head; no shared expert.

Source: Qwen3 technical report (arXiv 2505.09388), and the config.json of Qwen3-30B-A3B.
"""

from moecore.config import ConfigReader, ModelConfig, MoEConfig
from moecore.models.family import base_config, sparse_layers
from moecore.models.names import CheckpointNames

NAMES = CheckpointNames()


def read_config(keys: ConfigReader) -> ModelConfig:
    moe = MoEConfig(
        num_experts=keys.integer(
            "num_local_experts" if keys.has("num_local_experts") else "num_experts", 128
        ),
        top_k=keys.integer("num_experts_per_tok", 8),
        intermediate_size=keys.integer("moe_intermediate_size"),
        routing_class="softmax",
        routing={"renormalize": keys.boolean("norm_topk_prob", False)},
    )
    bias = keys.boolean("attention_bias", False)
    window = keys.get("sliding_window") if keys.boolean("use_sliding_window", False) else None
    return base_config(
        keys,
        moe,
        moe_layers=sparse_layers(keys, moe.num_experts),
        qk_norm="per_head",
        qkv_bias=bias,
        output_bias=bias,
        sliding_window=window,
    )
