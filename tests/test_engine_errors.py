"""Aborted, failed and refused requests leave a working engine."""

import pytest
import torch

from engine_runs import (
    PROMPT,
    assert_all_blocks_free,
    finish,
    generated,
    make_engine,
    reference,
    result_of,
    run_alone,
)
from fake_runner import FakeRunner
from moecore.sampling_params import SamplingParams


def test_abort_ends_what_runs_and_what_waits_and_frees_the_blocks():
    engine = make_engine(max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for request_id in ("running", "waiting", "other"):
        engine.add_request(request_id, PROMPT, params)
    engine.step()
    engine.step()
    running = engine.abort_request("running")
    waiting = engine.abort_request("waiting")
    assert result_of(running.outputs[0]) == (generated(2), "abort", None)
    assert result_of(waiting.outputs[0]) == ([], "abort", None)
    assert running.finished
    assert running.metrics.finished_time is not None
    assert engine.abort_request("running") is None
    assert engine.abort_request("never seen") is None
    assert result_of(finish(engine)["other"].outputs[0]) == (generated(10), "length", None)


def test_abort_keeps_what_had_finished():
    engine = make_engine()
    engine.add_request("a", PROMPT, SamplingParams(n=4, seed=2, max_tokens=40))
    while not any(c.finish_reason for output in engine.step() for c in output.outputs):
        pass
    reasons = {completion.finish_reason for completion in engine.abort_request("a").outputs}
    assert reasons == {"stop", "abort"}
    assert_all_blocks_free(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_pass_aborts_everything_and_leaves_a_working_engine(error):
    runner = FakeRunner()
    engine = make_engine(runner, max_num_seqs=2)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for request_id in "abc":
        engine.add_request(request_id, PROMPT, params)
    engine.step()

    def fail(batch):
        raise error("the device is on fire")

    working, runner.run = runner.run, fail
    with pytest.raises(error, match="on fire"):
        engine.step()
    assert not engine.has_unfinished
    assert_all_blocks_free(engine)
    runner.run = working
    engine.add_request("a", PROMPT, params)
    assert finish(engine)["a"].outputs[0].token_ids == generated(6)


def test_nan_logits_name_the_request_and_leave_a_working_engine():
    runner = FakeRunner()
    engine = make_engine(runner)
    for request_id in ("good", "bad"):
        engine.add_request(request_id, PROMPT, SamplingParams(temperature=0))
    working = runner.run
    runner.run = lambda batch: working(batch).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(ValueError, match="request 'bad'"):
        engine.step()
    assert_all_blocks_free(engine)


def test_logits_of_the_wrong_shape_are_refused():
    runner = FakeRunner()
    engine = make_engine(runner)
    engine.add_request("a", PROMPT, SamplingParams(temperature=0))
    runner.run = lambda batch: torch.zeros(2, runner.vocab_size)
    with pytest.raises(ValueError, match=r"logits must .*\[2, 23\]"):
        engine.step()
    assert_all_blocks_free(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, r"length in \[1, max_model_len\), got 0 with"),
        ([1] * 64, {}, r"length in \[1, max_model_len\), got 64 with max_model_len 64"),
        ([1, 23], {}, r"integers in \[0, 23\), got 23 at position 1"),
        ([1, -1], {}, r"integers in \[0, 23\), got -1 at position 1"),
        ([1.5], {}, r"integers in \[0, 23\), got 1.5 at position 0"),
        ("text", {}, r"integers in \[0, 23\), got 't' at position 0"),
        ([1], {"stop": "x"}, "stop must be empty without a tokenizer"),
        ([1] * 30, {"max_tokens": 12}, "got 30 prompt tokens and up to 12 new ones .* 40 tokens"),
        ([1] * 30, {"max_tokens": None}, "got 30 prompt tokens and up to 34 new ones"),
    ],
    ids=[
        "empty",
        "as-long-as-the-model",
        "above-vocabulary",
        "negative",
        "float",
        "str",
        "stop-without-tokenizer",
        "larger-than-the-cache",
        "unlimited-for-the-cache",
    ],
)
def test_bad_requests_are_refused_with_the_rule_and_the_value(prompt, params, message):
    engine = make_engine(FakeRunner(num_blocks=10, block_size=4))
    with pytest.raises(ValueError, match=message):
        engine.add_request("a", prompt, SamplingParams(**params))
    assert not engine.has_unfinished
    assert_all_blocks_free(engine)


def test_a_request_of_exactly_the_cache_is_served():
    runner = FakeRunner(num_blocks=10, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=11, ignore_eos=True)
    completion = run_alone([1] * 30, params, runner).outputs[0]
    assert result_of(completion) == reference([1] * 30, params, 0)


def test_the_id_of_an_unfinished_request_is_refused():
    engine = make_engine()
    engine.add_request("a", PROMPT, SamplingParams(temperature=0, max_tokens=2))
    with pytest.raises(ValueError, match="must not be that of an unfinished request, got 'a'"):
        engine.add_request("a", PROMPT, SamplingParams())
    finish(engine)
    engine.add_request("a", PROMPT, SamplingParams(temperature=0, max_tokens=2))
    finish(engine)
