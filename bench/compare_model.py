"""Whole models on the CPU: moecore beside transformers and llama.cpp, on the same weights.

Two random-weight checkpoints, made on first use: a Qwen3-MoE of 644 M parameters (191 M active) and
a Mixtral of 440 M (130 M active). Every prompt is random, and so is every token that follows it:
identical tokens would choose identical experts. Their o_proj is scaled by 0.1; without that, random
weights average a prompt into one direction, and nearly all of its tokens choose the same experts.

The read bandwidth is probed before and after each sample. It decides what decode can reach, and on
shared machines it changes by itself, so samples are grouped by it. A sample that met two states has
the mean of both probes, and may pass a floor made of it. The multiply-add rate is probed as often;
the floor of prompts takes the highest, since one probe of 10 ms may meet a slow moment.

    python bench/compare.py model [--models qwen3,mixtral] [--peers moecore,transformers-grouped_mm]
                                  [--cases prefill,decode1,decode8] [--repeats 5]

llama.cpp takes part where llama-cpp-python and gguf are installed; its GGUF file is written beside
the checkpoint on first use. It runs with its own defaults: flash attention where it chooses it,
float16 caches, weights mapped from the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from roofs import Roofs

VOCAB = 8192
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 512,
            "intermediate_size": 2048,
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 12,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (
        "Mixtral",
        {
            "intermediate_size": 2048,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 8,
        },
    ),
}
ATTENTION = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Case:
    """`batch` sequences of `depth` tokens, then `steps` single tokens each; 0 steps: the prompt."""

    batch: int
    depth: int
    steps: int


CASES = {"prefill": Case(1, 512, 0), "decode1": Case(1, 512, 48), "decode8": Case(8, 128, 24)}


def checkpoint(name: str, folder: Path) -> Path:
    """The folder of a random checkpoint, written on first use."""
    import transformers

    path = folder / name
    if not (path / "config.json").is_file():
        family, settings = SHAPES[name]
        config = getattr(transformers, f"{family}Config")(
            vocab_size=VOCAB, max_position_embeddings=4096, **ATTENTION, **settings
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(0.1)
        model.save_pretrained(path)
    return path


def active_bytes(path: Path, batch: int, depth: int) -> float:
    """Weights (of the experts that a random batch meets) and cache that one decode step reads."""
    from moecore.config import read_config

    config = read_config(path)
    moe, hidden = config.moe, config.hidden_size
    missed = (1 - moe.top_k / moe.num_experts) ** batch
    experts = moe.num_experts * (1 - missed) * 3 * hidden * moe.intermediate_size
    attention = hidden * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    per_layer = experts + attention + hidden * moe.num_experts
    cache = batch * depth * 2 * config.num_kv_heads * config.head_dim
    return 2.0 * (config.num_layers * (per_layer + cache) + hidden * config.vocab_size)


def active_flops(path: Path, tokens: int) -> float:
    """Multiply-adds of the weights that `tokens` meet, times two; attention and head left out."""
    per_token = active_bytes(path, 1, 0) / 2 - VOCAB * ATTENTION["hidden_size"]
    return 2.0 * per_token * tokens


def random_ids(count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,)).tolist()


Timer = Callable[[Case], float]  # seconds of the prompt, or of all steps of all sequences


def moecore_timer(path: Path) -> Timer:
    import moecore

    llm = moecore.LLM(
        path, max_model_len=2048, max_num_seqs=8, skip_tokenizer_init=True, use_tqdm=False
    )
    engine = llm.engine

    def run(case: Case) -> float:
        params = moecore.SamplingParams(temperature=0, max_tokens=case.steps + 1, ignore_eos=True)
        for number in range(case.batch):
            engine.add_request(f"r{number}", random_ids(case.depth), params, stream=False)
        begin = time.perf_counter()
        engine.step()
        if case.steps == 0:
            return time.perf_counter() - begin
        tokens = [random_ids(case.batch) for _ in range(case.steps)]
        begin = time.perf_counter()
        for next_ids in tokens:
            # As with the peers: the likeliest token is looked for, and a random one goes on.
            for sequence, token_id in zip(engine.scheduler.running, next_ids, strict=True):
                sequence.token_ids[-1] = token_id
            engine.step()
        assert not engine.has_unfinished
        return time.perf_counter() - begin

    return run


def transformers_timer(path: Path, experts: str) -> Timer:
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model.set_experts_implementation(experts)

    def run(case: Case) -> float:
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            prompt = torch.randint(0, VOCAB, (case.batch, case.depth))
            begin = time.perf_counter()
            model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            if case.steps == 0:
                return time.perf_counter() - begin
            tokens = torch.randint(0, VOCAB, (case.steps, case.batch, 1))
            begin = time.perf_counter()
            for token in tokens:
                model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            return time.perf_counter() - begin

    return run


def llama_cpp_timer(path: Path) -> Timer:
    from gguf_checkpoint import gguf_file
    from llama_cpp_model import LlamaCpp

    model = LlamaCpp(gguf_file(path), torch.get_num_threads(), max_len=1024)

    def run(case: Case) -> float:
        model.start(case.batch)
        prompt = torch.randint(0, VOCAB, (case.batch, case.depth), dtype=torch.int32).numpy()
        begin = time.perf_counter()
        model.decode(prompt).argmax(-1)
        if case.steps == 0:
            return time.perf_counter() - begin
        tokens = torch.randint(0, VOCAB, (case.steps, case.batch, 1), dtype=torch.int32).numpy()
        begin = time.perf_counter()
        for token in tokens:
            model.decode(token).argmax(-1)
        return time.perf_counter() - begin

    return run


def has_llama_cpp() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def timers(names: list[str], path: Path) -> Iterator[tuple[str, Timer]]:
    for name in names:
        if name == "moecore":
            yield name, moecore_timer(path)
        elif name.startswith("transformers-"):
            yield name, transformers_timer(path, name.removeprefix("transformers-"))
        elif name == "llama.cpp":
            yield name, llama_cpp_timer(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="qwen3,mixtral")
    parser.add_argument(
        "--peers", default="moecore,transformers-grouped_mm,transformers-eager,llama.cpp"
    )
    parser.add_argument("--cases", default="prefill,decode1,decode8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build-bench/models"))
    options = parser.parse_args()
    peers = options.peers.split(",")
    if "llama.cpp" in peers and not has_llama_cpp():
        peers.remove("llama.cpp")
        print("llama.cpp is left out: llama_cpp or gguf is missing (llama-cpp-python, gguf)\n")
    torch.set_num_threads(options.threads)
    roofs = Roofs(threads=options.threads)
    peaks = [roofs.matmul_gflops()]
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, ", end="")
    print(f"torch {torch.__version__}\n")
    print("| model | case | peer | GB/s probed | tok/s | min | max | floor tok/s | of floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in options.models.split(","):
        path = checkpoint(model, options.folder)
        ready = list(timers(peers, path))
        for case_name in options.cases.split(","):
            case = CASES[case_name]
            samples: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in ready}
            for repeat in range(options.repeats + 1):
                for name, run in ready:  # in turn, so that a change of state meets all of them
                    before = roofs.read_gbps()
                    seconds = run(case)
                    tokens = case.batch * (case.steps or case.depth)
                    bandwidth = (before + roofs.read_gbps()) / 2
                    peaks.append(roofs.matmul_gflops())
                    if repeat > 0:  # the first touches memory
                        samples[name].append((bandwidth, tokens / seconds))
            for name, found in samples.items():
                report(model, case_name, name, found, path, max(peaks))
    print(f"\nmatmul peak {max(peaks):.0f} GFLOP/s; ", end="")
    middle = statistics.median(peaks)
    print(f"of {len(peaks)} probes the least {min(peaks):.0f}, median {middle:.0f}")


def report(
    model: str,
    case_name: str,
    peer: str,
    samples: list[tuple[float, float]],
    path: Path,
    peak: float,
) -> None:
    """One line for each state of the memory that the samples met."""
    case = CASES[case_name]
    for is_fast in (False, True):
        chosen = [s for s in samples if (s[0] > 48) == is_fast]
        if not chosen:
            continue
        bandwidth = statistics.median(b for b, _ in chosen)
        rates = sorted(rate for _, rate in chosen)
        rate = statistics.median(rates)
        if case.steps == 0:
            floor = peak * 1e9 / active_flops(path, 1)
        else:
            step_bytes = active_bytes(path, case.batch, case.depth)
            floor = case.batch * bandwidth * 1e9 / step_bytes
        cells = [model, case_name, peer, f"{bandwidth:.1f}", f"{rate:.1f}"]
        cells += [f"{rates[0]:.1f}", f"{rates[-1]:.1f}", f"{floor:.0f}", f"{rate / floor:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
