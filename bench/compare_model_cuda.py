"""Decode of whole models on a GPU: real shapes, random weights, no files.

Every prompt is random; each is computed, and then single tokens of all of them. Prints, for each
number of sequences, milliseconds of a step (median), tokens a second and the share of the floor:
the weights that a step reads (of the experts met by one step that is looked at, not timed) and the
keys and values, at the read bandwidth measured here. o_proj is scaled by 0.1: else random weights
average a prompt into one direction, and nearly all of its tokens choose the same experts.

    python bench/compare.py model --device cuda [--model qwen3-30b-a3b] [--layers 48]
        [--batches 1,8,32,128] [--prompt 128] [--steps 48] [--temperature 0]
        [--peers moecore,moecore-eager,transformers-grouped_mm]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare_layer_cuda import read_gbps

import moecore
from moecore.config import ModelConfig, read_config

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rope_theta": 1000000.0,
    },
}
COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}

# Of so many sequences: seconds of each step, and the experts that a layer meets in one
Steps = Callable[[int], tuple[list[float], float]]


def step_bytes(config: ModelConfig, batch: int, depth: float, met: float) -> float:
    """What one decode step reads: weights of the experts met, the others' once, keys and values."""
    moe, hidden = config.moe, config.hidden_size
    experts = met * 3 * hidden * moe.intermediate_size
    attention = hidden * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    cache = batch * depth * 2 * config.num_kv_heads * config.head_dim
    per_layer = experts + attention + hidden * moe.num_experts + cache
    return 2.0 * (config.num_layers * per_layer + hidden * config.vocab_size)


def expected_experts(config: ModelConfig, batch: int) -> float:
    """How many experts tokens meet that choose at random."""
    moe = config.moe
    return moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** batch)


class Watched:
    """A decoder layer that notes how many experts its tokens met."""

    def __init__(self, layer: Any, top_k: int) -> None:
        self._layer, self._top_k, self.met = layer, top_k, 0

    def __call__(self, activations: Any, *arguments: Any) -> None:
        self._layer(activations, *arguments)
        self.met = len(activations.router_logits.float().topk(self._top_k).indices.unique())


class LayerByLayer:
    """The model's attention as one that its core does not know: each layer is then a call."""

    def __init__(self, attention: Any) -> None:
        self._attention, self.block_size = attention, attention.block_size

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self._attention(*arguments, **options)


def watch_step(engine: Any, top_k: int) -> float:
    """Compute one step layer by layer; return the mean number of experts met by a layer."""
    runner = engine._runner
    layers, graphs, attention = runner._model._layers, runner._graphs, runner._attention
    runner._model._layers = [Watched(layer, top_k) for layer in layers]
    runner._graphs, runner._attention = None, LayerByLayer(attention)
    engine.step()
    met = statistics.mean(layer.met for layer in runner._model._layers)
    runner._model._layers, runner._graphs, runner._attention = layers, graphs, attention
    return met


def random_ids(config: ModelConfig, count: int) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,)).tolist()


def moecore_steps(folder: Path, options: argparse.Namespace, eager: bool) -> Steps:
    llm = moecore.LLM(
        folder,
        device="cuda",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=max(options.batches),
        max_num_batched_tokens=8192,
        max_model_len=options.prompt + options.steps + 1,
        enforce_eager=eager,
        use_tqdm=False,
    )
    engine, config = llm.engine, llm.config
    for layer in engine._runner._model._layers:  # type: ignore[attr-defined]
        layer._attention.output.weight.mul_(0.1)
    params = moecore.SamplingParams(
        max_tokens=options.steps, temperature=options.temperature, ignore_eos=True
    )

    def run(batch: int) -> tuple[list[float], float]:
        for i in range(batch):
            prompt = random_ids(config, options.prompt)
            engine.add_request(f"{batch}-{i}", prompt, params, stream=False)
        while engine.scheduler.waiting or any(
            s.num_uncached_tokens > 1 for s in engine.scheduler.running
        ):
            engine.step()
        met = watch_step(engine, config.moe.top_k)
        seconds = []
        while engine.has_unfinished:
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
        return seconds, met

    return run


def transformers_steps(folder: Path, options: argparse.Namespace, experts: str) -> Steps:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    config = read_config(folder)
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(0.1)
    model.set_experts_implementation(experts)

    def run(batch: int) -> tuple[list[float], float]:
        prompt = torch.tensor([random_ids(config, options.prompt) for _ in range(batch)]).cuda()
        cache = DynamicCache(config=model.config)
        seconds = []
        with torch.inference_mode():
            logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            for _ in range(options.steps):
                begin = time.perf_counter()
                logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
                tokens.tolist()
                seconds.append(time.perf_counter() - begin)
        return seconds, expected_experts(config, batch)

    return run


def make_steps(peer: str, folder: Path, options: argparse.Namespace) -> Steps:
    if peer.startswith("transformers-"):
        return transformers_steps(folder, options, peer.removeprefix("transformers-"))
    return moecore_steps(folder, options, eager=peer == "moecore-eager")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer than the model's, to fit or to hurry")
    parser.add_argument("--batches", type=lambda s: [int(n) for n in s.split(",")])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--peers", default="moecore")
    parser.set_defaults(batches=[1, 8, 32, 128])
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    gbps = read_gbps()
    torch.cuda.empty_cache()
    settings = {**COMMON, **MODELS[options.model]}
    if options.layers:
        settings["num_hidden_layers"] = options.layers
    print(
        f"{torch.cuda.get_device_name()}, moecore {moecore.__version__}, "
        f"torch {torch.__version__}; read {gbps:.0f} GB/s; {options.model}, "
        f"{settings['num_hidden_layers']} layers, prompts of {options.prompt}\n"
    )
    print("| peer | sequences | experts met | floor ms | ms a step | min | tok/s | of floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(settings))
        for peer in options.peers.split(","):
            begin = time.perf_counter()
            steps = make_steps(peer, folder, options)
            print(f"<!-- {peer} was ready after {time.perf_counter() - begin:.1f} s -->")
            for batch in options.batches:
                steps(batch)  # warms up
                seconds, met = steps(batch)
                middle = statistics.median(seconds)
                depth = options.prompt + options.steps / 2
                floor = step_bytes(read_config(folder), batch, depth, met) / gbps / 1e9
                print(
                    f"| {peer} | {batch} | {met:.0f} | {floor * 1e3:.2f} | {middle * 1e3:.2f} | "
                    f"{min(seconds) * 1e3:.2f} | {batch / middle:.0f} | {floor / middle:.0%} |",
                    flush=True,
                )
            del steps
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
