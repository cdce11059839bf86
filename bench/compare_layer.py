"""One MoE layer's experts: moecore beside transformers' implementations, in one process.

Every case runs on the same random weights and tokens, each token with a routing of its own. Several
layers take turns, so weights come from memory, not from a cache; the implementations take turns
too, so that a change of the machine's state meets all of them. Prints a Markdown table: the median
of the runs, in microseconds, and how much longer each peer takes than moecore with packed weights.

    python bench/compare.py layer [--shape small-many] [--tokens 1,2,4,8,32,128,512] [--repeats 15]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moecore
from moecore import ops
from moecore.integrations import transformers as integration

# H, I, E, k
SHAPES = {
    "small-many": (1024, 512, 32, 8),
    "small-few": (1024, 2048, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}
COLD_BYTES = 400 << 20
BATCHED_MM_MAX_TOKENS = 32  # it copies the weights of every token: T * k * 6 H I bytes

Routed = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def make_layers(shape: str) -> list[Qwen3MoeExperts]:
    hidden, inner, experts, top_k = SHAPES[shape]
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
    )
    count = max(2, -(-COLD_BYTES // (6 * experts * hidden * inner)))
    layers = []
    for _ in range(count):
        module = Qwen3MoeExperts(config).to(torch.bfloat16).eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        layers.append(module)
    return layers


def implementations(layers: list[Qwen3MoeExperts]) -> dict[str, Routed]:
    def through_transformers(name: str) -> Routed:
        def run(index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            module = layers[index % len(layers)]
            module.config._experts_implementation = name
            return module(x, ids, weights)

        return run

    packed = [
        moecore.MoELayer(
            ops.prepare_weights(module.gate_up_proj, gated=True),
            ops.prepare_weights(module.down_proj),
            ops.RoutingConfig(top_k=module.config.num_experts_per_tok),
        )
        for module in layers
    ]

    def run_packed(index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return packed[index % len(packed)].forward_routed(x, ids.int(), weights.float())

    return {
        "moecore packed": run_packed,
        "moecore": through_transformers("moecore"),
        "grouped_mm": through_transformers("grouped_mm"),
        "batched_mm": through_transformers("batched_mm"),
        "eager": through_transformers("eager"),
    }


def measure(cases: dict[str, Routed], inputs: list[tuple[Tensor, ...]], repeats: int, passes: int):
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, run in cases.items():
            begin = time.perf_counter()
            for i in range(passes):
                run(repeat * passes + i, *inputs[i % len(inputs)])
            if repeat > 0:  # the first round warms up
                times[name].append((time.perf_counter() - begin) / passes * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def largest_error(cases: dict[str, Routed], inputs: tuple[Tensor, ...]) -> float:
    """The largest norm of a difference from eager's output, relative to its norm."""
    want = cases["eager"](0, *inputs).float()
    errors = [
        ((cases[name](0, *inputs).float() - want).norm() / want.norm()).item()
        for name in cases
        if name.startswith("moecore")
    ]
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default=None)
    parser.add_argument("--tokens", default="1,2,4,8,32,128,512")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    integration.register()
    print(
        f"moecore {moecore.__version__} ({moecore.build_info()['cpu_isa']}), "
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{moecore.num_threads()} threads, {platform.machine()}\n"
    )
    print("| shape | T | moecore packed | moecore | grouped_mm | batched_mm | eager | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        hidden, _, experts, top_k = SHAPES[shape]
        layers = make_layers(shape)
        cases = implementations(layers)
        for num_tokens in map(int, arguments.tokens.split(",")):
            inputs = []
            for _ in range(8):
                logits = torch.randn(num_tokens, experts)
                weights, ids = logits.softmax(-1).topk(top_k)
                x = torch.randn(num_tokens, hidden).bfloat16()
                inputs.append((x, ids, (weights / weights.sum(-1, keepdim=True)).bfloat16()))
            chosen = {
                name: run
                for name, run in cases.items()
                if name != "batched_mm" or num_tokens <= BATCHED_MM_MAX_TOKENS
            }
            with torch.inference_mode():
                us = measure(chosen, inputs, arguments.repeats, max(1, 32 // num_tokens))
                error = largest_error(chosen, inputs[0])
            base = us["moecore packed"]
            cells = [f"{base:.0f}"]
            for name in ("moecore", "grouped_mm", "batched_mm", "eager"):
                cells.append(f"{us[name]:.0f} ({us[name] / base:.1f}x)" if name in us else "-")
            print(f"| {shape} | {num_tokens} | {' | '.join(cells)} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
