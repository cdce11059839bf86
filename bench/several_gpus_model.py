"""Whole models with random weights on ranks: the stage "model" of several_gpus.py."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from compare_model_cuda import COMMON, MODELS

import moecore

SMALL = {
    **MODELS["qwen3-30b-a3b"],
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 1000,
}


def seconds_of(llm: moecore.LLM, batch: int, prompt: int, steps: int) -> tuple[float, float, list]:
    """Seconds of the prompts and of all steps after them, and the tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, prompt)
    prompts = torch.randint(0, llm.config.vocab_size, shape, generator=generator).tolist()

    def run(count: int) -> tuple[float, list]:
        params = moecore.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        results = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin, [r.outputs[0].token_ids for r in results]

    run(2)
    first, _ = run(1)
    whole, token_ids = run(steps + 1)
    return first, whole - first, token_ids


def main() -> int:
    device, size, out, amount = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    is_small = device == "cpu" or amount == "smoke"
    shapes = {"small": SMALL} if is_small else MODELS
    batch, prompt, steps = (4, 16, 8) if is_small else (32, 128, 32)
    table = out / "model.md"
    if not table.exists():
        table.write_text(
            "| model | layers | ranks | ready s | prompt tok/s | decode tok/s | equal tokens |\n"
            "| --- | --- | --- | --- | --- | --- | --- |\n"
        )
    is_right = True
    for name, shape in shapes.items():
        settings = {**COMMON, **shape}
        if name == "mixtral-8x7b":
            settings["num_hidden_layers"] = 16  # 47 GB, so that one GPU, too, holds all
        wanted = None
        for ranks in sorted({1, size}):
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(settings))
                with moecore.LLM(
                    folder,
                    device=device,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    max_num_seqs=batch,
                    max_num_batched_tokens=8192,
                    max_model_len=prompt + steps + 2,
                    expert_parallel_size=ranks,
                    use_tqdm=False,
                ) as llm:
                    ready = time.perf_counter() - begin
                    first, rest, token_ids = seconds_of(llm, batch, prompt, steps)
            wanted = wanted or token_ids
            is_equal = token_ids == wanted
            is_right = is_right and is_equal
            cells = [name, settings["num_hidden_layers"], ranks, f"{ready:.1f}"]
            cells += [f"{batch * prompt / first:.0f}", f"{batch * steps / rest:.0f}"]
            with table.open("a") as file:
                file.write(f"| {' | '.join(map(str, [*cells, 'yes' if is_equal else 'NO']))} |\n")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
