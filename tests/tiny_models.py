"""Tiny random transformers models with the keys of the real ones, and how to run them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.20")

HIDDEN, INNER, EXPERTS, TOP_K, VOCAB = 64, 48, 8, 3, 128


class Family(NamedTuple):
    settings: dict[str, Any]  # beyond _COMMON
    num_moe_layers: int
    routing: dict[str, Any] = {}  # arguments of oracle.choices  # noqa: RUF012


_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GLM_LIKE = {
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": INNER,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_QWEN_LIKE = {"num_experts": EXPERTS, "moe_intermediate_size": INNER}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,  # the last of every four has full attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_GLM_ROUTING = {
    "score_function": "sigmoid",
    "group_limit": "top2_sum",
    "num_groups": 4,
    "topk_group": 2,
}
MODELS = {
    "Mixtral": Family({"num_local_experts": EXPERTS}, 3),
    "Olmoe": Family({"num_experts": EXPERTS}, 3),
    "Qwen2Moe": Family({**_QWEN_LIKE, "shared_expert_intermediate_size": 32}, 3),
    "Qwen3Moe": Family({**_QWEN_LIKE, "head_dim": 16, "norm_topk_prob": True}, 3),
    "DeepseekV3": Family({**_GLM_LIKE, **_LATENT_ATTENTION}, 2, _GLM_ROUTING),
    "Glm4Moe": Family({**_GLM_LIKE, "head_dim": 16}, 2, _GLM_ROUTING),
    "GptOss": Family(
        {
            "num_local_experts": EXPERTS,
            "head_dim": 16,
            "sliding_window": 8,
            "swiglu_alpha": 1.5,
            "swiglu_limit": 1.0,  # Reached by many values of order 1.
        },
        3,
    ),
}
# Families beside these seven: held to eager in float32 only.
OTHER_MODELS = {
    "DeepseekV2": Family(
        {**_GLM_LIKE, **_LATENT_ATTENTION, "topk_method": "group_limited_greedy"}, 2
    ),
    "DeepseekV4": Family(
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "head_dim": 16,
            "qk_rope_head_dim": 8,
            "q_lora_rank": 24,
            "o_lora_rank": 16,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "swiglu_limit": 0.5,
        },
        3,
    ),
    "Dots1": Family(_GLM_LIKE, 2),
    "Ernie4_5_Moe": Family(
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": INNER,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        2,
    ),
    "GraniteMoe": Family({"num_local_experts": EXPERTS}, 3),
    "HunYuanMoEV1": Family(
        {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 16, "num_shared_expert": 1}, 3
    ),
    "HYV4": Family(
        {
            "num_local_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "head_dim": 16,
            "swiglu_limit": 0.5,
        },
        2,
    ),
    "MiniMaxM2": Family({"num_local_experts": EXPERTS, "head_dim": 16, "rotary_dim": 16}, 3),
    "MiniMaxM3VL": Family(
        {
            "num_local_experts": EXPERTS,
            "head_dim": 16,
            "rotary_dim": 16,
            "swiglu_alpha": 1.5,
            "swiglu_limit": 1.0,
        },
        3,
    ),
    "Qwen3_5Moe": Family(
        {**_QWEN_LIKE, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 32, "head_dim": 16},
        4,
    ),
    "Qwen3Next": Family(
        {**_QWEN_LIKE, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 32, "head_dim": 16},
        4,
    ),
}
each_model = pytest.mark.parametrize("name", list(MODELS))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose parameters are all random, and the same at every call."""
    model_class = getattr(transformers, f"{name}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = model_class.config_class(**_COMMON | (MODELS | OTHER_MODELS)[name].settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for key, parameter in model.named_parameters():
            # Unit gain through every matrix keeps logits of order 1, far from ties; small values
            # elsewhere give the biases and the correction something to do.
            if parameter.dim() >= 2 and not key.endswith("bias"):
                fan_in = HIDDEN if "embed" in key or "gate_up" in key else parameter.shape[-1]
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
            elif "norm" not in key:
                torch.nn.init.normal_(parameter, std=0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.1)
    return model.to(dtype).eval()


def batch() -> dict[str, torch.Tensor]:
    """Two prompts of 12 and 7 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(
    model: Any, implementation: str, inputs: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """[number of tokens that are no padding, VOCAB] float64."""
    model.set_experts_implementation(implementation)
    inputs = batch() if inputs is None else inputs
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].double()


def generate(
    model: Any, implementation: str, inputs: dict[str, torch.Tensor], num_tokens: int = 16
) -> torch.Tensor:
    """Greedy tokens, [batch, prompt + num_tokens]."""
    model.set_experts_implementation(implementation)
    return model.generate(
        **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
    )


def experts_of(model: Any) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(m, "is_concatenated")]
