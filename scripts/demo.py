"""Stock transformers generate() on a random-weight Qwen3-MoE, with each experts implementation.

One line of moecore changes what runs inside every MoE layer; the rest is transformers' own code.
"""

import time

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moecore
from moecore.integrations import transformers as integration

PROMPT_TOKENS, NEW_TOKENS = 128, 32


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def generate(model: Qwen3MoeForCausalLM, prompt: torch.Tensor) -> tuple[list[int], float]:
    """Greedy tokens, and new tokens per second."""
    arguments = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        begin = time.perf_counter()
        output = model.generate(prompt, **arguments)
        seconds = time.perf_counter() - begin
    return output[0, PROMPT_TOKENS:].tolist(), NEW_TOKENS / seconds


def main() -> None:
    integration.register()
    model = make_model()
    prompt = torch.randint(0, 8192, (1, PROMPT_TOKENS))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"Qwen3-MoE, {parameters:.0f} M random bfloat16 parameters, "
        f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new ones, {moecore.num_threads()} threads"
    )
    results = {}
    for name in ("eager", "grouped_mm", "moecore"):
        model.set_experts_implementation(name)
        results[name] = generate(model, prompt)
    integration.pack(model)
    results["moecore, packed"] = generate(model, prompt)

    eager_tokens, eager_rate = results["eager"]
    for name, (tokens, rate) in results.items():
        same = next(
            (i for i, (a, b) in enumerate(zip(tokens, eager_tokens, strict=True)) if a != b),
            NEW_TOKENS,
        )
        print(
            f"{name:16s} {rate:6.1f} tokens/s  {rate / eager_rate:4.1f} x eager, "
            f"first {same} of {NEW_TOKENS} tokens as eager's"
        )
    print("(bfloat16 rounds differently in each: a random model's near-ties may part ways.)")


if __name__ == "__main__":
    main()
