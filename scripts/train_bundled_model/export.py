"""The trained model as Hugging Face files, and a check that transformers reads the same model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from model import ModelConfig, Qwen3Moe
from safetensors.torch import save_file
from torch import Tensor


def transformers_config(config: ModelConfig, eos_token_id: int) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **dataclasses.asdict(config),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": eos_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": config.moe_intermediate_size * config.num_experts_per_tok,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "pad_token_id": eos_token_id,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.01,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }


def generation_config(eos_token_id: int) -> dict[str, Any]:
    """generation_config.json."""
    return {
        "do_sample": True,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def named_weights(model: Qwen3Moe) -> dict[str, Tensor]:
    """The weights in bfloat16 under the names of Qwen3-MoE checkpoints."""
    weights = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm}
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        weights[f"{layer}.input_layernorm.weight"] = model.attention_norm[i]
        weights[f"{layer}.post_attention_layernorm.weight"] = model.experts_norm[i]
        weights[f"{layer}.self_attn.q_norm.weight"] = model.q_norm[i]
        weights[f"{layer}.self_attn.k_norm.weight"] = model.k_norm[i]
        weights[f"{layer}.mlp.gate.weight"] = model.router[i]
        for name in ("q", "k", "v", "o"):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = getattr(model, name)[i]
        for e in range(model.config.num_experts):
            expert = f"{layer}.mlp.experts.{e}"
            weights[f"{expert}.gate_proj.weight"] = model.gate_up[i, 0, e]
            weights[f"{expert}.up_proj.weight"] = model.gate_up[i, 1, e]
            weights[f"{expert}.down_proj.weight"] = model.down[i, e].mT
    return {
        name: weight.detach().to("cpu", torch.bfloat16, copy=True).contiguous()
        for name, weight in weights.items()
    }


def write_model(model: Qwen3Moe, eos_token_id: int, folder: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors, the last all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "config.json": transformers_config(model.config, eos_token_id),
        "generation_config.json": generation_config(eos_token_id),
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    part = folder / "model.safetensors.part"
    save_file(named_weights(model), part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")


@torch.no_grad()
def round_weights(model: Qwen3Moe) -> None:
    """Rounds the model's weights to the bfloat16 values that write_model stores."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


@torch.inference_mode()
def difference_from_transformers(model: Qwen3Moe, folder: Path, tokens: Tensor) -> float:
    """The largest difference of a logit, in float32 on the CPU, between `model` with its weights
    rounded and what transformers loads from `folder`. tokens: [B, S]."""
    from transformers import AutoModelForCausalLM

    # Eager: transformers' own mathematics, each expert on its own tokens.
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ours = Qwen3Moe(model.config).eval()
    ours.load_state_dict(model.state_dict())
    round_weights(ours)
    tokens = tokens.cpu().long()
    return (ours(tokens).logits - theirs(tokens).logits).abs().max().item()
