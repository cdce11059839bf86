"""One MoE layer's experts on a GPU: moecore beside torch and transformers, in one process.

Every implementation runs a row of layers in one CUDA graph: random weights in several sets that
take turns, so that they come from memory and not from the cache, and a routing for each layer.
Replays of the implementations take turns; above 512 tokens the GPU rests 30 ms before each, since
power limits slow long runs down. Prints a Markdown table: microseconds of one layer (median), and
the share of the floor that is: weights of the experts met, tokens in and out, at the read
bandwidth, or the multiply-adds at the rate of a large matrix product, both measured here.

    python bench/compare.py layer --device cuda [--shape qwen3-30b-a3b] [--tokens 1,8,32,128,512]
                                                [--routing uniform,skewed] [--repeats 11]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

import moecore
from moecore import ops

# H, I, E, k; deepseek-v3 as one of 8 ranks sees it
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "deepseek-v3/8": (7168, 2048, 32, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
}
COLD_BYTES = 2 << 30  # weights, at least: many times the cache
BATCHED_MM_MAX_TOKENS = 8  # it copies the weights of every token
IDLE_FROM_TOKENS = 1024
IDLE_SECONDS = 0.03


@dataclass(frozen=True)
class Weights:
    gate_up: Tensor  # [E, 2 I, H]
    down: Tensor  # [E, H, I]


@dataclass(frozen=True)
class Routing:
    ids: Tensor  # [T, k] int32
    weights: Tensor  # [T, k] float32


Layer = Callable[[Tensor, Weights, Routing], Tensor]


def read_gbps() -> float:
    """GB/s of adding up 4 GiB."""
    x = torch.ones(1 << 30, device="cuda")
    return 4 * x.numel() / seconds(x.sum) / 1e9


def matmul_tflops() -> float:
    """TFLOP/s of a product of two random 8192 x 8192 matrices in bfloat16."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / seconds(lambda: a @ b) / 1e12


def seconds(run: Callable[[], object], repeats: int = 9) -> float:
    """Of one of four calls back to back, after a rest: the least, as becomes a roof."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        time.sleep(IDLE_SECONDS)
        run()  # wakes the clocks
        begin.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 4e3)
    return min(times)


def make_weights(shape: str, count: int) -> list[Weights]:
    hidden, inner, experts, _ = SHAPES[shape]
    made = []
    for _ in range(count):
        gate_up = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16, device="cuda")
        down = torch.empty(experts, hidden, inner, dtype=torch.bfloat16, device="cuda")
        made.append(Weights(gate_up.normal_(std=0.05), down.normal_(std=0.05)))
    return made


def make_routing(shape: str, num_tokens: int, skewed: bool) -> Routing:
    """k experts of each token: all equally likely, or with odds that fall as 1 / rank."""
    _, _, experts, top_k = SHAPES[shape]
    odds = 1.0 / torch.arange(1, experts + 1, device="cuda") if skewed else torch.ones(experts)
    ids = odds.cuda().repeat(num_tokens, 1).multinomial(top_k).int()
    weights = torch.rand(num_tokens, top_k, device="cuda") + 0.1
    return Routing(ids, weights / weights.sum(1, keepdim=True))


def torch_layer(x: Tensor, w: Weights, routing: Routing) -> Tensor:
    """Sort, gather, two grouped products, and a weighted sum in the order of the choices."""
    num_tokens, top_k = routing.ids.shape
    experts = len(w.down)
    ids, order = routing.ids.flatten().sort(stable=True)
    ends = torch.searchsorted(
        ids, torch.arange(experts, device="cuda", dtype=torch.int32), right=True
    )
    ends = ends.int()
    gate, up = torch._grouped_mm(x[order // top_k], w.gate_up.mT, offs=ends).chunk(2, dim=1)
    rows = torch._grouped_mm(silu(gate) * up, w.down.mT, offs=ends)
    slots = torch.empty_like(rows)
    slots[order] = rows
    slots = slots.view(num_tokens, top_k, -1)
    return (slots * routing.weights[..., None]).sum(1).to(x.dtype)


def moecore_layer(top_k: int) -> Layer:
    layers: dict[int, moecore.MoELayer] = {}

    def run(x: Tensor, w: Weights, routing: Routing) -> Tensor:
        layer = layers.get(w.down.data_ptr())
        if layer is None:
            layer = moecore.MoELayer(w.gate_up, w.down, ops.RoutingConfig(top_k=top_k))
            layers[w.down.data_ptr()] = layer
        return layer.forward_routed(x, routing.ids, routing.weights)

    return run


def transformers_layer(name: str, shape: str) -> Layer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    hidden, inner, experts, top_k = SHAPES[shape]
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def run(x: Tensor, w: Weights, routing: Routing) -> Tensor:
        module.gate_up_proj = torch.nn.Parameter(w.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(w.down, requires_grad=False)
        out: Tensor = module(x, routing.ids.long(), routing.weights.to(x.dtype))
        return out

    return run


def capture(layer: Layer, x: Tensor, layers: list[tuple[Weights, Routing]]) -> torch.cuda.CUDAGraph:
    for w, routing in layers:  # allocates, and chooses algorithms
        layer(x, w, routing)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w, routing in layers:
            layer(x, w, routing)
    return graph


def measure(
    graphs: dict[str, torch.cuda.CUDAGraph], num_layers: int, repeats: int, idle: bool
) -> dict[str, float]:
    """Microseconds of one layer."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(repeats + 1):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if idle:
                torch.cuda.synchronize()
                time.sleep(IDLE_SECONDS)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat > 0:  # the first round warms up
                times[name].append(begin.elapsed_time(end) / num_layers * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def layers_at(num_tokens: int) -> int:
    """Layers of a graph: enough work for the clock, not too much for the patience."""
    for limit, count in ((8, 12), (128, 6), (512, 3), (4096, 2)):
        if num_tokens <= limit:
            return count
    return 1


def floor_us(
    shape: str, routings: list[Routing], num_tokens: int, gbps: float, tflops: float
) -> float:
    hidden, inner, _, top_k = SHAPES[shape]
    active = statistics.mean(len(r.ids.unique()) for r in routings)
    bytes_moved = active * 6 * hidden * inner + 4 * num_tokens * hidden
    flops = 6 * num_tokens * top_k * hidden * inner
    return max(bytes_moved / gbps / 1e3, flops / tflops / 1e6)


def run_case(
    shape: str, weights: list[Weights], num_tokens: int, routing: str, roofs: tuple[float, float],
    repeats: int,
) -> str:  # fmt: skip
    hidden, _, _, top_k = SHAPES[shape]
    x = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
    routings = [make_routing(shape, num_tokens, routing == "skewed") for _ in range(12)]
    count = layers_at(num_tokens)
    layers = [(weights[i % len(weights)], routings[i]) for i in range(count)]
    cases: dict[str, Layer] = {"moecore": moecore_layer(top_k), "torch": torch_layer}
    cases["grouped_mm"] = transformers_layer("grouped_mm", shape)
    if num_tokens <= BATCHED_MM_MAX_TOKENS:
        cases["batched_mm"] = transformers_layer("batched_mm", shape)
    want = torch_layer(x, *layers[0]).float()
    error = ((cases["moecore"](x, *layers[0]).float() - want).norm() / want.norm()).item()
    graphs = {name: capture(run, x, layers) for name, run in cases.items()}
    us = measure(graphs, count, repeats, idle=num_tokens >= IDLE_FROM_TOKENS)
    floor = floor_us(shape, routings[:count], num_tokens, *roofs)
    cells = [f"{us['moecore']:.1f} ({floor / us['moecore']:.0%})"]
    for name in ("torch", "grouped_mm", "batched_mm"):
        cells.append(f"{us[name]:.1f} ({us[name] / us['moecore']:.2f}x)" if name in us else "-")
    return (
        f"| {shape} | {routing} | {num_tokens} | {floor:.1f} | {' | '.join(cells)} | {error:.1e} |"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokens", default="1,8,32,128,512,4096,16384")
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.manual_seed(0)
    roofs = read_gbps(), matmul_tflops()
    print(
        f"{torch.cuda.get_device_name()}, moecore {moecore.__version__}, "
        f"torch {torch.__version__}; "
        f"read {roofs[0]:.0f} GB/s, matmul {roofs[1]:.0f} TFLOP/s\n"
    )
    print("| shape | routing | T | floor us | moecore | torch | grouped_mm | batched_mm | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in [options.shape] if options.shape else SHAPES:
        hidden, inner, experts, _ = SHAPES[shape]
        weights = make_weights(shape, max(2, -(-COLD_BYTES // (6 * experts * hidden * inner))))
        for num_tokens in map(int, options.tokens.split(",")):
            for routing in options.routing.split(","):
                print(
                    run_case(shape, weights, num_tokens, routing, roofs, options.repeats),
                    flush=True,
                )
        del weights
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
