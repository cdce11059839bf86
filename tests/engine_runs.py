"""Requests through an engine, and alone without one."""

from fake_runner import FakeRunner, make_logits
from moecore.engine import Engine
from moecore.sampling import RequestSampler, sample
from moecore.sampling_params import SamplingParams

EOS = 3
PROMPT = [5, 1, 4, 1, 5, 9, 2, 6]


def make_engine(runner=None, **arguments):
    return Engine(runner or FakeRunner(), None, eos_token_ids=[EOS], **arguments)


def finish(engine, outputs=()):
    """Step until all is done. Returns {request id: its last output}."""
    last = {output.request_id: output for output in outputs}
    while engine.has_unfinished:
        last.update((output.request_id, output) for output in engine.step())
    assert_all_blocks_free(engine)
    return last


def run_alone(prompt_token_ids, params, runner=None, **arguments):
    engine = make_engine(runner, **arguments)
    engine.add_request("alone", prompt_token_ids, params)
    return finish(engine)["alone"]


def assert_all_blocks_free(engine):
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting


def reference(prompt, params, seed, vocab_size=23, max_model_len=64):
    """The same request without engine, scheduler or cache: (token ids, finish and stop reason)."""
    sampler = RequestSampler(
        params, prompt_token_ids=prompt, seed=seed, eos_token_ids=[EOS], vocab_size=vocab_size
    )
    token_ids = []
    while True:
        logits = make_logits(prompt + token_ids, vocab_size)
        token_id = sample(logits[None], [sampler])[0].token_id
        sampler.accept(token_id)
        token_ids.append(token_id)
        if token_id == EOS and not params.ignore_eos:
            return token_ids, "stop", None
        if token_id in params.stop_token_ids:
            return token_ids, "stop", token_id
        if len(token_ids) == params.max_tokens or len(prompt + token_ids) == max_model_len:
            return token_ids, "length", None


def result_of(completion):
    return completion.token_ids, completion.finish_reason, completion.stop_reason


def generated(num_tokens, **arguments):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **arguments)
    return reference(PROMPT, params, 0, max_model_len=10**6)[0]
