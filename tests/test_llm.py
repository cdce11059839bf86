"""LLM and generate(), on the bundled model."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import moecore
from moecore import LLM, SamplingParams
from moecore.hub import resolve_model

PROMPTS = ["Once upon a time", "The king", "In the dark wood there lived a"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", use_tqdm=False) as llm:
        yield llm


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model, to be changed."""
    return shutil.copytree(resolve_model(None), tmp_path / "model")


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def test_results_come_in_the_order_of_the_prompts(llm):
    results = generate(llm, PROMPTS)
    assert [r.prompt for r in results] == PROMPTS
    assert all(r.finished and r.outputs[0].finish_reason in ("stop", "length") for r in results)
    assert [r.prompt_token_ids for r in results] == [llm.tokenizer.encode(p) for p in PROMPTS]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_prompt_gets_the_same_tokens_alone_and_in_a_batch(llm, temperature):
    params = SamplingParams(temperature=temperature, max_tokens=24, seed=3)
    together = generate(llm, PROMPTS, params)
    alone = [generate(llm, prompt, params)[0] for prompt in PROMPTS]
    assert [r.outputs[0].token_ids for r in together] == [r.outputs[0].token_ids for r in alone]


def test_every_form_of_a_prompt_means_the_same(llm):
    ids = llm.tokenizer.encode(PROMPTS[0])
    forms = [PROMPTS[0], ids, {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    texts = [generate(llm, form)[0].outputs[0].text for form in forms]
    assert len(set(texts)) == 1
    assert [r.outputs[0].text for r in generate(llm, forms)] == texts


def test_each_prompt_may_have_its_own_parameters(llm):
    params = [SamplingParams(temperature=0, max_tokens=m, ignore_eos=True) for m in (1, 2, 3)]
    results = generate(llm, PROMPTS, params)
    assert [len(r.outputs[0].token_ids) for r in results] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"sampling_params must be one or one a prompt \(3\)"):
        generate(llm, PROMPTS, params[:2])


def test_a_stream_grows_to_what_generate_gives(llm):
    texts = [output.outputs[0].text for output in llm.stream(PROMPTS[0], GREEDY)]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert len(texts) > 10
    assert texts[-1] == generate(llm, PROMPTS[0])[0].outputs[0].text


def test_closing_a_stream_ends_its_request(llm):
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished


def test_streams_may_be_read_in_turn(llm):
    want = [generate(llm, prompt)[0].outputs[0].text for prompt in PROMPTS[:2]]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    last = ["", ""]
    for _ in range(100):
        for i, stream in enumerate(streams):
            output = next(stream, None)
            last[i] = output.outputs[0].text if output else last[i]
    assert last == want


def test_threads_may_share_a_model(llm):
    want = [generate(llm, prompt)[0].outputs[0].text for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda prompt: generate(llm, prompt)[0], PROMPTS * 2))
    assert [r.outputs[0].text for r in results] == want * 2


def test_a_failed_pass_ends_every_request_with_an_error(folder):
    with LLM(folder, device="cpu", use_tqdm=False) as llm:
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        runner = llm.engine._runner
        runner.run, real = lambda batch: torch.zeros(9, 9), runner.run
        with pytest.raises(ValueError, match="logits must be float32"):
            generate(llm, PROMPTS[1])
        runner.run = real
        with pytest.raises(RuntimeError, match="request 0 was aborted: a pass failed"):
            next(stream)
        assert generate(llm, PROMPTS[1])[0].finished


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt_token_ids must have a length"),
        ({"prompt_token_ids": [5, 10**6]}, "must be integers in .*got 1000000 at position 1"),
        ({"prompt_token_ids": [5] * 5000}, "must have a length in .*got 5000"),
    ],
    ids=["empty", "outside the vocabulary", "too long"],
)
def test_a_prompt_that_cannot_run_starts_nothing(llm, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, [PROMPTS[0], prompt if prompt else {"prompt_token_ids": []}])
    assert not llm.engine.has_unfinished


def test_chat_uses_the_template_of_the_checkpoint(folder, llm):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Once upon"}]
    with LLM(folder, device="cpu", use_tqdm=False) as chatty:
        result = chatty.chat(messages, GREEDY, use_tqdm=False)[0]
        both = chatty.chat([messages, messages], GREEDY, use_tqdm=False)
    assert result.prompt == "<user>Once upon"
    assert [r.outputs[0].text for r in both] == [result.outputs[0].text] * 2
    if "chat_template" not in (resolve_model(None) / "tokenizer_config.json").read_text():
        with pytest.raises(ValueError, match="chat template"):
            llm.chat(messages)


def test_the_one_liner_returns_text(llm):
    want = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=8))
    got = moecore.generate(PROMPTS[0], temperature=0, max_tokens=8, device="cpu")
    assert got == want[0].outputs[0].text


def test_unknown_keywords_name_the_nearest_known_one():
    with pytest.raises(TypeError, match="unknown argument 'max_seq_len'.*'max_model_len'"):
        LLM(max_seq_len=5)
    with pytest.raises(TypeError, match="unknown argument 'temprature'.*'temperature'"):
        moecore.generate("x", temprature=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"load_format": "gguf"}, ValueError, "load_format must be 'auto' or 'dummy', got 'gguf'"),
        ({"dtype": "int8"}, ValueError, "dtype must be .* got 'int8'"),
        ({"device": "mps"}, ValueError, "device must be .* got 'mps'"),
        ({"max_model_len": 0}, ValueError, "max_model_len must be at least 1, got 0"),
        ({"max_model_len": 10**7}, ValueError, "max_model_len must be at most .* got 10000000"),
        ({"kv_cache_memory": 10}, ValueError, "kv_cache_memory must hold .* got 10 bytes"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
        (
            {"max_num_batched_tokens": 63},
            ValueError,
            r"max_num_batched_tokens must be at least max_num_seqs \(64\), got 63",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LLM(**{"device": "cpu", "use_tqdm": False, **arguments})


def test_a_closed_model_says_so(folder):
    llm = LLM(folder, device="cpu", use_tqdm=False)
    llm.close()
    with pytest.raises(RuntimeError, match="the model is closed"):
        generate(llm, PROMPTS[0])


def test_dummy_weights_need_no_file_and_repeat_by_seed(folder):
    (folder / "model.safetensors").unlink()
    runs = []
    for seed in (1, 1, 2):
        with LLM(folder, device="cpu", load_format="dummy", seed=seed, use_tqdm=False) as dummy:
            runs.append(generate(dummy, PROMPTS[0])[0].outputs[0].token_ids)
    assert runs[0] == runs[1] != runs[2]


def test_the_dtype_can_be_chosen(folder, llm):
    with LLM(folder, device="cpu", dtype="float32", use_tqdm=False) as exact:
        assert exact.dtype == torch.float32
        assert generate(exact, PROMPTS[0])[0].outputs[0].text
    assert llm.dtype == torch.bfloat16


def test_a_small_cache_preempts_and_changes_nothing(folder, llm):
    params = [SamplingParams(temperature=0.8, max_tokens=100, seed=i) for i in range(6)]
    prompts = [PROMPTS[i % 3] for i in range(6)]
    want = [r.outputs[0].token_ids for r in generate(llm, prompts, params)]
    config = llm.config
    token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
    with LLM(
        folder, device="cpu", max_model_len=128, kv_cache_memory=5 * 64 * token, use_tqdm=False
    ) as small:
        results = generate(small, prompts, params)
    assert [r.outputs[0].token_ids for r in results] == want
    assert sum(r.metrics.num_preemptions for r in results) > 0
