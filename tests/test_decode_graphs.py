"""Decode passes as CUDA graphs: which sizes there are, and that they change nothing."""

import pytest
import torch

import moecore
from moecore import LLM, SamplingParams
from moecore.batch import Batch
from moecore.decode_graphs import graph_sizes, is_decode

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and moecore.build_info()["has_cuda"]),
    reason="needs a GPU and a build with CUDA kernels",
)
PROMPTS = ["Once upon a time", "The cat", "One day, a little girl named Lily", "Tom had a"]


@pytest.mark.parametrize(
    ("max_num_seqs", "want"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes_end_with_the_largest(max_num_seqs, want):
    assert graph_sizes(max_num_seqs) == want


def make_batch(query_lens, num_logits):
    count = sum(query_lens)
    return Batch(
        token_ids=torch.zeros(count, dtype=torch.int64),
        positions=torch.zeros(count, dtype=torch.int32),
        query_offsets=torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32),
        context_lens=torch.ones(len(query_lens), dtype=torch.int32),
        block_tables=torch.zeros(len(query_lens), 1, dtype=torch.int32),
        logit_rows=torch.arange(num_logits),
    )


def test_only_one_token_of_each_sequence_is_a_decode():
    assert is_decode(make_batch([1, 1, 1], 3))
    assert not is_decode(make_batch([1, 2], 2))
    assert not is_decode(make_batch([1, 1], 1))  # a prompt's chunk of one token


@pytest.fixture(scope="module")
def runs():
    """Tokens with graphs and without, and the log-probabilities."""
    params = [
        SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=20 + 7 * i, ignore_eos=True, logprobs=1
        )
        for i in range(11)
    ]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(11)]
    results = {}
    for name, options in {"graphs": {}, "eager": {"enforce_eager": True}}.items():
        with LLM(device="cuda", max_num_seqs=9, use_tqdm=False, **options) as llm:
            results[name] = llm.generate(prompts, params, use_tqdm=False)
            if name == "graphs":
                results["alone"] = [
                    llm.generate(prompt, one, use_tqdm=False)[0]
                    for prompt, one in zip(prompts, params, strict=True)
                ]
    return results


@needs_cuda
@pytest.mark.parametrize("other", ["eager", "alone"])
def test_graphs_and_company_change_no_token_and_no_bit(runs, other):
    for got, want in zip(runs["graphs"], runs[other], strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
        assert got.outputs[0].logprobs == want.outputs[0].logprobs


@needs_cuda
def test_the_model_runs_on_the_gpu_as_on_the_cpu():
    greedy = SamplingParams(temperature=0, max_tokens=60)
    texts = []
    for device in ("cuda", "cpu"):
        with LLM(device=device, use_tqdm=False) as llm:
            texts.append([r.outputs[0].text for r in llm.generate(PROMPTS, greedy, use_tqdm=False)])
    # Rounding differs between the devices, so a near tie may fall otherwise; most do not.
    assert sum(gpu == cpu for gpu, cpu in zip(*texts, strict=True)) >= len(PROMPTS) // 2
