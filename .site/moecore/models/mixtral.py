"""Mixtral: grouped-query attention, softmax over the two best of E experts.

Source: Mixtral of Experts (arXiv 2401.04088), and the config.json of Mixtral-8x7B.
"""

from moecore.config import ConfigReader, ModelConfig, MoEConfig
from moecore.models.family import base_config
from moecore.models.names import CheckpointNames

NAMES = CheckpointNames(
    moe_prefixes=("block_sparse_moe", "mlp"),
    expert_gate="experts.{e}.w1.weight",
    expert_up="experts.{e}.w3.weight",
    expert_down="experts.{e}.w2.weight",
)


def read_config(keys: ConfigReader) -> ModelConfig:
    moe = MoEConfig(
        num_experts=keys.integer("num_local_experts", 8),
        top_k=keys.integer("num_experts_per_tok", 2),
        intermediate_size=keys.integer("intermediate_size"),
        routing_class="softmax",
    )
    return base_config(keys, moe, sliding_window=keys.get("sliding_window"), default_theta=1e6)
