"""The GGUF file of a Qwen3-MoE or Mixtral checkpoint, for llama.cpp.

The same weights under llama.cpp's names: matrices keep their dtype; norms and the router become
float32, as llama.cpp's own converter has them. There is no tokenizer: callers pass token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
}
RAW_TYPES = {
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.float32: gguf.GGMLQuantizationType.F32,
}
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
IN_EXPERT = {
    gguf.MODEL_ARCH.QWEN3MOE: {
        "ffn_gate_exps": "gate_proj",
        "ffn_up_exps": "up_proj",
        "ffn_down_exps": "down_proj",
    },
    gguf.MODEL_ARCH.LLAMA: {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"},
}
MOE_BLOCK = {gguf.MODEL_ARCH.QWEN3MOE: "mlp", gguf.MODEL_ARCH.LLAMA: "block_sparse_moe"}


def gguf_file(path: Path) -> Path:
    """Return the GGUF file in a checkpoint's folder, written on first use.

    Args:
        path: a folder with config.json and one model.safetensors.

    Raises:
        ValueError: llama.cpp would compute another model than the configuration describes.
    """
    target = path / "model.gguf"
    if not target.is_file():
        partial = path / "model.gguf.partial"  # an interrupted write leaves no half file behind
        write_gguf(path, partial)
        partial.rename(target)
    return target


def write_gguf(path: Path, target: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    arch = architecture(config)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    add_settings(writer, config)
    for name, tensor in named_tensors(load_file(path / "model.safetensors"), config, arch):
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=RAW_TYPES[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture(config: dict[str, Any]) -> gguf.MODEL_ARCH:
    """llama.cpp's name for the architecture; what it does not read from the file is checked."""
    name = config["architectures"][0]
    if name not in ARCHITECTURES:
        raise ValueError(
            f"gguf_file: architectures must be one of {sorted(ARCHITECTURES)}, got {name}"
        )
    fixed = {"hidden_act": "silu", "norm_topk_prob": True, "mlp_only_layers": []}
    fixed |= {"decoder_sparse_step": 1, "attention_bias": False, "sliding_window": None}
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"gguf_file: {key} must be {value}, got {config[key]}")
    rope_type = config["rope_parameters"]["rope_type"]
    if rope_type != "default":
        raise ValueError(f"gguf_file: rope_type must be default, got {rope_type}")
    return ARCHITECTURES[name]


def head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(
        config.get("moe_intermediate_size", config["intermediate_size"])
    )
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def named_tensors(
    weights: dict[str, Tensor], config: dict[str, Any], arch: gguf.MODEL_ARCH
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint under its GGUF name, in the order that llama.cpp stores."""

    def take(source: str) -> Tensor | None:
        return weights.get(f"{source}.weight")

    for name, source in OUTSIDE.items():
        if (tensor := take(source)) is not None:  # tied embeddings: no lm_head
            yield name, tensor.float() if tensor.dim() == 1 else tensor
    for layer in range(config["num_hidden_layers"]):
        inside, outside = f"model.layers.{layer}", f"blk.{layer}"
        for name, source in IN_LAYER.items():
            if (tensor := take(f"{inside}.{source}")) is None:  # Mixtral: no norms of heads
                continue
            if arch == gguf.MODEL_ARCH.LLAMA and name in ("attn_q", "attn_k"):
                tensor = interleaved(tensor, head_dim(config))
            yield f"{outside}.{name}", tensor.float() if tensor.dim() == 1 else tensor
        block = f"{inside}.{MOE_BLOCK[arch]}"
        yield f"{outside}.ffn_gate_inp", weights[f"{block}.gate.weight"].float()
        for name, source in IN_EXPERT[arch].items():
            experts = range(config["num_local_experts"])
            parts = [weights[f"{block}.experts.{e}.{source}.weight"] for e in experts]
            yield f"{outside}.{name}", torch.stack(parts)


def interleaved(weight: Tensor, dim: int) -> Tensor:
    """Rows of q or k for the llama architecture, whose rotation pairs rows 2 i and 2 i + 1.

    transformers pairs rows i and i + dim / 2 of a head.
    """
    heads = weight.unflatten(0, (-1, 2, dim // 2))
    return heads.transpose(1, 2).reshape(weight.shape)
