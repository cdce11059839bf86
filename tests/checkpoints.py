"""Tiny random checkpoints with the config keys and tensor names of real ones, by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 128

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.15,  # routing and logits then vary from token to token
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 8},
    "Olmoe": {"num_experts": 8, "num_key_value_heads": 4, "clip_qkv": 1.5},
    "Qwen2Moe": {
        "num_experts": 8,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "Qwen3Moe": {
        "num_experts": 8,
        "moe_intermediate_size": 48,
        "head_dim": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
}


def make_model(family: str, *, seed: int = 0, **settings: Any) -> Any:
    """A float32 transformers model with eager experts and attention."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        **{**_COMMON, **FAMILIES[family], **settings}, attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # a norm of ones would hide that its weight is read
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.set_experts_implementation("eager")
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write a checkpoint as transformers does (per-expert tensors)."""
    model.save_pretrained(folder, **options)
    return folder


def fuse_experts(folder: Path) -> None:
    """Rewrite a single-file checkpoint with one 3-D tensor for all experts of a layer."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    found: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name in list(tensors):
        match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            block = match[1].replace("block_sparse_moe", "mlp")
            part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
            experts = found.setdefault(block, {}).setdefault(part, {})
            experts[int(match[2])] = tensors.pop(name)
        elif "block_sparse_moe" in name:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
    for block, parts in found.items():
        order = range(len(parts["gate_proj"]))
        tensors[f"{block}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([parts["gate_proj"][e], parts["up_proj"][e]]) for e in order]
        )
        tensors[f"{block}.experts.down_proj"] = torch.stack([parts["down_proj"][e] for e in order])
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
