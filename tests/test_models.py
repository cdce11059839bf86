"""Whole models against transformers, on tiny random checkpoints with real keys and names."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moecore
from checkpoints import FAMILIES, VOCAB, edit_config, fuse_experts, make_model, save
from model_runs import Runner, logits_of
from moecore import SamplingParams
from moecore.config import RopeConfig, read_config
from moecore.rope import cos_sin_table

TOKENS = torch.randint(0, VOCAB, (150,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> tuple[Path, object]:
    """One family's float32 checkpoint, and the transformers model that it came from."""
    model = make_model(request.param)
    return save(model, tmp_path_factory.mktemp(request.param)), model


@torch.inference_mode()
def reference_logits(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_float32_logits_equal_those_of_transformers(checkpoint, device):
    folder, model = checkpoint
    got = logits_of(folder, TOKENS, torch.float32, device)
    want = reference_logits(model, TOKENS)
    # Both sides round some 12 sums of at most 128 terms a layer, in different orders; over three
    # layers the errors stay below 3 * 12 * sqrt(128) eps = 407 eps of a logit's typical size. A
    # router near a tie would show as an error of 1e-2 and more.
    eps = torch.finfo(torch.float32).eps
    assert relative_error(got, want) < 407 * eps
    torch.testing.assert_close(got, want, rtol=0, atol=407 * eps * float(want.std()) * 8)


def test_bfloat16_logits_err_no_more_than_those_of_transformers(checkpoint, device):
    folder, model = checkpoint
    exact = reference_logits(model, TOKENS)
    rounded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    rounded.set_experts_implementation("eager")
    theirs = (reference_logits(rounded, TOKENS) - exact).norm(dim=-1) / exact.norm(dim=-1)
    got = logits_of(folder, TOKENS, torch.bfloat16, device)
    ours = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
    # The same weights, rounded at nearly the same places: the median token errs alike (routers near
    # a tie, where bfloat16 takes another expert, are in the tail of both).
    assert ours.median() < 1.15 * theirs.median()


@pytest.mark.parametrize("layout", ["sharded", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_a_checkpoint_gives_the_same_bits(family, layout, tmp_path):
    model = make_model(family)
    plain = save(model, tmp_path / "plain")
    if layout == "sharded":
        other = save(model, tmp_path / "other", max_shard_size="100KB")
        assert len(list(other.glob("*.safetensors"))) > 2
    else:
        other = save(model, tmp_path / "other")
        fuse_experts(other)
    want = logits_of(plain, TOKENS[:20], torch.float32, "cpu")
    assert torch.equal(logits_of(other, TOKENS[:20], torch.float32, "cpu"), want)


@torch.inference_mode()
def test_greedy_tokens_of_ragged_prompts_equal_those_of_transformers(checkpoint, device):
    folder, model = checkpoint
    prompts = [TOKENS[:3], TOKENS[5:70], TOKENS[80:81], TOKENS[90:122]]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with moecore.LLM(folder, device=device, use_tqdm=False, skip_tokenizer_init=True) as llm:
        got = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # transformers would mask out tokens of pad's id
            max_new_tokens=64,
            do_sample=False,
        )
        assert output.outputs[0].token_ids == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_have_the_same_bits_in_any_batch_and_any_chunks(checkpoint, dtype):
    folder, _ = checkpoint
    want = logits_of(folder, TOKENS, dtype, "cpu")
    runner = Runner(folder, dtype)
    cuts = [0, 1, 64, 65, 100, 149, 150]
    pieces = []
    for step, (begin, end) in enumerate(itertools.pairwise(cuts)):
        others = {7: TOKENS[step * 9 : step * 9 + 5], 8: [step]}
        order = {7: others[7], 0: TOKENS[begin:end], 8: others[8]}
        pieces.append(runner.run(order)[0])
    assert torch.equal(torch.cat(pieces), want)


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_have_the_same_bits_on_any_number_of_threads(checkpoint, threads):
    folder, _ = checkpoint
    before = moecore.num_threads()
    want = logits_of(folder, TOKENS, torch.bfloat16, "cpu")
    moecore.set_num_threads(threads)
    try:
        assert torch.equal(logits_of(folder, TOKENS, torch.bfloat16, "cpu"), want)
    finally:
        moecore.set_num_threads(before)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotary_tables_equal_those_of_transformers(scaling):
    model = make_model("Qwen3Moe", rope_parameters={"rope_theta": 5e4, **scaling})
    positions = torch.arange(256)
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    rope = RopeConfig(theta=5e4, rotary_dim=32, scaling=scaling)
    table = cos_sin_table(rope, 256, max_position_embeddings=512)
    want = torch.cat([cos[0, :, :16], sin[0, :, :16]], dim=-1)
    # An angle of up to 256 rounds by 2**-17, and so do its sine and cosine.
    torch.testing.assert_close(table, want, rtol=0, atol=2**-16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "gpt2"}, moecore.UnsupportedError, "model_type must be one of .*'gpt2'"),
        ({"hidden_act": "relu"}, moecore.UnsupportedError, "hidden_act must be 'silu'.*'relu'"),
        ({"hidden_size": "64"}, moecore.FormatError, "hidden_size must be an integer >= 1.*'64'"),
        ({"num_hidden_layers": None}, moecore.FormatError, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, moecore.FormatError, "a divisor of num_attention_heads"),
        ({"num_experts_per_tok": 9}, moecore.FormatError, r"num_experts_per_tok must be in \[1, 8"),
        ({"dtype": "float7"}, moecore.FormatError, "dtype must be the name of a dtype"),
        ({"sliding_window": 64}, moecore.UnsupportedError, "sliding_window must be absent or"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            moecore.UnsupportedError,
            "rope_type must be .* got 'longrope'",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            moecore.UnsupportedError,
            "quantization_config must be absent, got quant_method 'fp8'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_names_file_key_and_value(changes, error, message, tmp_path):
    folder = save(make_model("Mixtral"), tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(error, match=message) as caught:
        read_config(folder)
    assert changes.keys() & {"sliding_window"} or str(folder / "config.json") in str(caught.value)
