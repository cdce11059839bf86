"""One model on 1, 2, ... ranks of this machine, sharing its threads out, as `model` makes it.

Every size runs in turn, so that a change of the machine meets all of them. "alone" is LLM without
expert parallelism. The peak memory of a rank is its process's resident set.

    python bench/compare.py ranks [--models qwen3] [--sizes 2,4] [--cases prefill1,decode1,decode8]
                                  [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from compare_model import CASES, Case, checkpoint, random_ids
from roofs import Roofs

import moecore
from moecore.expert_parallel.members import ProcessMember

RANK_CASES = {
    "prefill1": CASES["prefill"],
    "prefill8": Case(8, 512, 0),
    "decode1": CASES["decode1"],
    "decode8": CASES["decode8"],
    "decode32": Case(32, 128, 24),
}


def load(path: Path, size: int) -> tuple[moecore.LLM, float]:
    """A model on that many ranks, and the seconds until it is ready."""
    begin = time.perf_counter()
    llm = moecore.LLM(
        path,
        device="cpu",
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=4096,
        skip_tokenizer_init=True,
        expert_parallel_size=size,
        use_tqdm=False,
    )
    return llm, time.perf_counter() - begin


def seconds_of(llm: moecore.LLM, case: Case, threads: int) -> float:
    """Seconds of the prompts, or of all steps after them; rank 0 runs on that many threads."""
    moecore.set_num_threads(threads)
    engine = llm.engine
    # At temperature 1 a random model's tokens are random.
    params = moecore.SamplingParams(max_tokens=case.steps + 1, ignore_eos=True)
    for sequence in range(case.batch):
        engine.add_request(f"r{sequence}", random_ids(case.depth), params, stream=False)
    begin = time.perf_counter()
    engine.step()
    if case.steps > 0:
        begin = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - begin


def peak_mib(process: int | str) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="qwen3")
    parser.add_argument("--sizes", default="2")
    parser.add_argument("--cases", default="prefill1,prefill8,decode1,decode8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build-bench/models"))
    options = parser.parse_args()
    roofs = Roofs(threads=options.threads)
    sizes = [1, *map(int, options.sizes.split(","))]
    print(f"{options.threads} threads in all, torch {torch.__version__}\n")
    print("| model | case | ranks | GB/s probed | samples | tok/s | min | max | of alone |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models.split(","):
        path = checkpoint(name, options.folder)
        ready = []
        for size in sizes:
            moecore.set_num_threads(options.threads)
            llm, seconds = load(path, size)
            ready.append((size, llm, seconds))
        for case_name in options.cases.split(","):
            compare(name, case_name, ready, options, roofs)
        print()
        for size, llm, seconds in ready:
            report_memory(size, llm, seconds)
            llm.close()


def compare(
    name: str,
    case_name: str,
    ready: list[tuple[int, moecore.LLM, float]],
    options: argparse.Namespace,
    roofs: Roofs,
) -> None:
    """A line for each number of ranks and each state of the memory that the samples met."""
    case = RANK_CASES[case_name]
    samples: dict[int, list[tuple[float, float]]] = {size: [] for size, _, _ in ready}
    for repeat in range(options.repeats + 1):
        for size, llm, _ in ready:
            before = roofs.read_gbps()
            seconds = seconds_of(llm, case, max(1, options.threads // size))
            bandwidth = (before + roofs.read_gbps()) / 2
            if repeat > 0:  # the first touches memory
                rate = case.batch * (case.steps or case.depth) / seconds
                samples[size].append((bandwidth, rate))
    for is_fast in (False, True):
        alone = None
        for size, found in samples.items():
            chosen = [sample for sample in found if (sample[0] > 48) == is_fast]
            if not chosen:
                continue
            rates = [rate for _, rate in chosen]
            middle = statistics.median(rates)
            alone = middle if size == 1 else alone
            share = "-" if alone is None else f"{middle / alone:.2f}"
            bandwidth = statistics.median(bandwidth for bandwidth, _ in chosen)
            cells = [name, case_name, "alone" if size == 1 else str(size), f"{bandwidth:.0f}"]
            cells += [str(len(chosen)), f"{middle:.1f}", f"{min(rates):.1f}", f"{max(rates):.1f}"]
            print(f"| {' | '.join([*cells, share])} |", flush=True)


def report_memory(size: int, llm: moecore.LLM, seconds: float) -> None:
    processes: list[int | str] = []
    if size > 1:
        members = llm.engine._group._members.values()
        processes += [m.process.pid for m in members if isinstance(m, ProcessMember)]
    peaks = [f"{peak_mib(process)} MiB" for process in processes]
    print(f"{size} ranks: ready in {seconds:.1f} s; peak of the other ranks: {peaks or 'none'}")


if __name__ == "__main__":
    main()
