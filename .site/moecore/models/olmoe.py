"""OLMoE: query and key normalised over their full width; top-k weights that do not sum to 1.

Source: OLMoE (arXiv 2409.02060), and the config.json of OLMoE-1B-7B-0924.
"""

from moecore.config import ConfigReader, ModelConfig, MoEConfig
from moecore.models.family import base_config
from moecore.models.names import CheckpointNames

NAMES = CheckpointNames()


def read_config(keys: ConfigReader) -> ModelConfig:
    moe = MoEConfig(
        num_experts=keys.integer("num_experts", 64),
        top_k=keys.integer("num_experts_per_tok", 8),
        intermediate_size=keys.integer("intermediate_size"),
        routing_class="softmax",
        routing={"renormalize": keys.boolean("norm_topk_prob", False)},
    )
    bias = keys.boolean("attention_bias", False)
    return base_config(
        keys,
        moe,
        qk_norm="full_width",
        qkv_bias=bias,
        output_bias=bias,
        clip_qkv=keys.number("clip_qkv") if keys.has("clip_qkv") else None,
    )
