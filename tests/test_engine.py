"""Engine: every request gets the tokens of running alone, ends as asked, and leaks nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from fake_runner import FakeRunner, make_logits
from moecore.engine import Engine
from moecore.request import derive_seed
from moecore.sampling_params import SamplingParams

# --- The same tokens in every company ---

sampling_params = st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    seed=st.one_of(st.none(), st.integers(0, 9)),
    stop_token_ids=st.sampled_from([(), (7, 8)]),
    ignore_eos=st.booleans(),
    max_tokens=st.one_of(st.none(), st.integers(1, 20)),
)


@st.composite
def workloads(draw):
    """An engine, and requests: (step before which it comes, prompt, params, step of its abort)."""
    block_size = draw(st.integers(1, 6))
    max_model_len = draw(st.integers(2, 40))
    smallest = -(-(max_model_len - 1) // block_size)
    num_blocks = draw(st.integers(smallest, 2 * smallest))
    max_num_seqs = draw(st.integers(1, 6))
    runner = FakeRunner(num_blocks, block_size, max_model_len=max_model_len)
    engine = make_engine(
        runner,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, max_num_seqs + 20)),
        seed=draw(st.integers(0, 3)),
    )
    prompts = st.lists(st.integers(0, 22), min_size=1, max_size=max_model_len - 1)
    aborts = st.one_of(st.none(), st.none(), st.integers(1, 30))
    request = st.tuples(st.integers(0, 25), prompts, sampling_params, aborts)
    requests = draw(st.lists(request, min_size=1, max_size=6))
    return engine, sorted(requests, key=lambda request: request[0])


@settings(deadline=None, max_examples=100)
@given(workloads())
def test_any_mix_gives_the_tokens_of_running_alone(workload):
    engine, requests = workload
    last = {}
    for step in range(10_000):
        for number, (arrival, prompt, params, abort) in enumerate(requests):
            if arrival == step:
                engine.add_request(str(number), prompt, params)
            if abort is not None and arrival + abort == step:
                output = engine.abort_request(str(number))
                if output is not None:
                    last[str(number)] = output
        last.update((output.request_id, output) for output in engine.step())
        if len(last) == len(requests) and not engine.has_unfinished:
            break
    assert_all_blocks_free(engine)
    max_model_len = engine._runner.max_model_len
    for number, (_, prompt, params, _) in enumerate(requests):
        output = last[str(number)]
        assert output.finished
        seed = derive_seed(engine._seed, number) if params.seed is None else params.seed
        for index, completion in enumerate(output.outputs):
            seed_here = seed if index == 0 else derive_seed(seed, index)
            want = reference(prompt, params, seed_here, max_model_len=max_model_len)
            if completion.finish_reason == "abort":
                assert completion.token_ids == want[0][: len(completion.token_ids)]
            else:
                assert result_of(completion) == want


@pytest.mark.parametrize("max_num_batched_tokens", [1, 2, 3, 7, 8, 9, 100])
def test_a_prompt_cut_into_chunks_gives_the_same_tokens(max_num_batched_tokens):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    output = run_alone(
        PROMPT, params, max_num_seqs=1, max_num_batched_tokens=max_num_batched_tokens
    )
    assert result_of(output.outputs[0]) == reference(PROMPT, params, 0)


def test_preemption_changes_no_token():
    runner = FakeRunner(num_blocks=8, block_size=2, max_model_len=17)
    engine = make_engine(runner)
    params = SamplingParams(max_tokens=10, ignore_eos=True, seed=1)
    for number in range(4):
        engine.add_request(str(number), [number, 1, 2], params)
    outputs = finish(engine)
    assert sum(output.metrics.num_preemptions for output in outputs.values()) > 0
    for number in range(4):
        want = reference([number, 1, 2], params, 1)
        assert result_of(outputs[str(number)].outputs[0]) == want


def test_a_long_request_is_not_starved_by_short_ones_that_keep_coming():
    engine = make_engine(FakeRunner(num_blocks=8, block_size=2, max_model_len=17), max_num_seqs=3)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    engine.add_request("early", [1, 2], params)
    engine.step()
    engine.add_request("long", PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))
    for step in range(30):
        engine.add_request(f"short {step}", [step % 23] * 4, params)
        if any(output.request_id == "long" and output.finished for output in engine.step()):
            break
    # One step until `early` ends, and one a token.
    assert step + 1 <= 10
    finish(engine)


# --- Seeds ---


def test_seeds_follow_the_engine_the_order_and_the_index():
    def tokens(engine_seed, **arguments):
        engine = make_engine(seed=engine_seed)
        params = SamplingParams(max_tokens=12, ignore_eos=True, **arguments)
        for request_id in "ab":
            engine.add_request(request_id, PROMPT, params)
        outputs = finish(engine)
        return [c.token_ids for request_id in "ab" for c in outputs[request_id].outputs]

    first = tokens(0, n=2)
    assert tokens(0, n=2) == first
    assert len({tuple(token_ids) for token_ids in first + tokens(1, n=2)}) == 8
    assert tokens(0) == [first[0], first[2]]
    seeded = tokens(0, n=2, seed=4)
    assert seeded[:2] == seeded[2:]
    assert seeded == tokens(1, n=2, seed=4)


# --- Ends ---


def test_end_of_sequence_stops_unless_ignored():
    # Made to appear early: the runner's own greedy token at the third step is the EOS here.
    tokens = generated(8)
    eos = tokens[2]
    at = tokens.index(eos) + 1
    for ignore_eos, want in [
        (False, (tokens[:at], "stop", None)),
        (True, (tokens, "length", None)),
    ]:
        engine = Engine(FakeRunner(), None, eos_token_ids=[eos])
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=ignore_eos)
        engine.add_request("a", PROMPT, params)
        assert result_of(finish(engine)["a"].outputs[0]) == want


def test_a_stop_token_stops_and_is_the_stop_reason():
    tokens = generated(8)
    at = tokens.index(tokens[4]) + 1
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[tokens[4]]
    )
    completion = run_alone(PROMPT, params).outputs[0]
    assert result_of(completion) == (tokens[:at], "stop", tokens[4])


def test_stop_tokens_are_barred_until_min_tokens():
    stop_token_ids = list(range(12))
    params = SamplingParams(
        temperature=0, max_tokens=30, min_tokens=9, ignore_eos=True, stop_token_ids=stop_token_ids
    )
    completion = run_alone(PROMPT, params).outputs[0]
    assert all(token_id >= 12 for token_id in completion.token_ids[:9])
    assert len(completion.token_ids) > 9
    assert completion.finish_reason == "stop"


def test_length_ends_at_max_tokens_or_the_models_longest():
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert result_of(run_alone(PROMPT, params).outputs[0]) == (generated(5), "length", None)
    for max_tokens in (None, 100):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        runner = FakeRunner(max_model_len=len(PROMPT) + 7)
        completion = run_alone(PROMPT, params, runner).outputs[0]
        assert result_of(completion) == (generated(7), "length", None)


# --- Outputs ---


def test_every_step_reports_all_tokens_so_far():
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=5)
    engine.add_request("a", PROMPT, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    steps = [engine.step() for _ in range(5)]
    assert steps[0] == []  # 5 of 8 prompt tokens
    outputs = [output for step in steps[1:] for output in step]
    tokens = generated(4)
    assert [output.outputs[0].token_ids for output in outputs] == [
        tokens[:count] for count in range(1, 5)
    ]
    assert [output.finished for output in outputs] == [False, False, False, True]
    assert [output.outputs[0].finish_reason for output in outputs] == [None, None, None, "length"]
    assert not engine.has_unfinished
    assert engine.step() == []


def test_without_stream_only_the_end_is_reported():
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    engine.add_request("quiet", PROMPT, params, stream=False)
    engine.add_request("loud", PROMPT, params)
    reported = [[output.request_id for output in engine.step()] for _ in range(4)]
    assert reported == [["loud"], ["loud"], ["loud"], ["quiet", "loud"]]


def test_a_request_is_finished_when_all_its_completions_are():
    engine = make_engine()
    params = SamplingParams(n=4, seed=2, max_tokens=40)
    engine.add_request("a", PROMPT, params, "what was asked")
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    ends = [[c.finish_reason is not None for c in output.outputs] for output in outputs]
    assert [output.finished for output in outputs] == [all(row) for row in ends]
    assert any(any(row) and not all(row) for row in ends)
    assert [completion.index for completion in outputs[-1].outputs] == [0, 1, 2, 3]
    assert outputs[-1].prompt == "what was asked"
    assert outputs[-1].prompt_token_ids == PROMPT
    assert_all_blocks_free(engine)


def test_logprobs_of_every_token_add_up():
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
    completion = run_alone(PROMPT, params).outputs[0]
    total = 0.0
    for count, (token_id, entries) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        logits = make_logits(PROMPT + completion.token_ids[:count], 23)
        want = logits.double().log_softmax(0)
        assert set(entries) == set(want.topk(2).indices.tolist())
        # float32 log_softmax of 23 numbers below 10: a few roundings of at most 10.
        assert entries[token_id].logprob == pytest.approx(float(want[token_id]), abs=1e-5)
        total += entries[token_id].logprob
    assert completion.cumulative_logprob == total


def test_metrics_are_in_order():
    engine = make_engine()
    engine.add_request("a", PROMPT, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    first, _, last = [engine.step()[0].metrics for _ in range(3)]
    assert first.arrival_time == last.arrival_time <= first.first_token_time
    assert first.first_token_time == last.first_token_time < last.finished_time
    assert first.finished_time is None
    assert last.num_preemptions == 0
