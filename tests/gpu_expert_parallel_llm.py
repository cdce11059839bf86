"""LLM on several ranks of GPUs: run by hand, `python tests/gpu_expert_parallel_llm.py`.

Holds the tokens and log-probabilities of virtual ranks on one GPU, and of a process a GPU over NCCL
where there are several (or NCCL_MULTI_RANK_GPU_ENABLE=1), to those of one rank; kills a rank, and
stops one.
"""

import os
import signal
import time

import pytest
import torch

from moecore import LLM, SamplingParams, TransportError

PROMPTS = ["Once upon a time", "The king", "In the dark wood there lived a", "A", "One day"]


def options(size, backend):
    return {
        "device": "cuda",
        "expert_parallel_size": size,
        "expert_parallel_backend": backend,
        "kv_cache_memory": 256 << 20,
        "use_tqdm": False,
    }


def run(size, backend):
    """Everything that the requests' results say."""
    params = [
        SamplingParams(temperature=0, max_tokens=32, logprobs=20),
        SamplingParams(temperature=0.8, seed=7, max_tokens=24, logprobs=5),
        *[SamplingParams(temperature=0.9, max_tokens=40, ignore_eos=True)] * 3,
    ]
    begin = time.perf_counter()
    with LLM(**options(size, backend)) as llm:
        ready = time.perf_counter() - begin
        llm.generate(PROMPTS, params, use_tqdm=False)
        begin = time.perf_counter()
        results = llm.generate(PROMPTS, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
    count = sum(len(c.token_ids) for r in results for c in r.outputs)
    print(f"{size} {backend}: ready in {ready:.1f} s, {count / seconds:.0f} tok/s", flush=True)
    return [r.outputs for r in results]


def lose_a_rank(size, how):
    """Rank 1 gets a signal in the middle of a stream, whose next tokens raise."""
    with LLM(**options(size, "processes"), expert_parallel_timeout=5.0) as llm:
        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True))
        next(stream)
        llm.engine._group._members[1].process.send_signal(how)
        begin = time.perf_counter()
        with pytest.raises(TransportError) as raised:
            list(stream)
        assert raised.value.rank == 1
        seconds = time.perf_counter() - begin
        print(f"a rank got {how.name}: {seconds:.2f} s, {raised.value}", flush=True)


def main():
    want = run(1, "threads")
    for size in (2, 4, 8):
        assert run(size, "threads") == want, f"{size} virtual ranks"
    count = torch.cuda.device_count()
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        count = max(2, count)
    for size in (2, 4, 8):
        if size <= count:
            assert run(size, "processes") == want, f"{size} processes"
    if count > 1:
        for how in (signal.SIGKILL, signal.SIGSTOP):
            lose_a_rank(2, how)
    print("all equal")


if __name__ == "__main__":
    main()
