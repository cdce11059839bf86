"""Engine with a tokenizer: text as it comes, and stop strings."""

import pytest
import tokenizers

from fake_runner import FakeRunner
from moecore.engine import Engine
from moecore.sampling_params import SamplingParams
from moecore.tokenizer import Tokenizer

EOS = 3
PIECES = ["Ġ", "Ã©", "...", "<eos>", *"abcdefghijklmnopqrs"]  # byte-level: " ", "é", "..."
PROMPT = [5, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    vocab = {piece: token_id for token_id, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def run(tokenizer, eos_token_ids=(EOS,), **arguments):
    """All outputs of one request, one a step."""
    runner = FakeRunner(vocab_size=len(PIECES))
    engine = Engine(runner, tokenizer, eos_token_ids=eos_token_ids)
    params = SamplingParams(**{"temperature": 0, "max_tokens": 20, **arguments})
    engine.add_request("a", PROMPT, params)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert engine.scheduler.pool.num_free == runner.num_blocks
    return [output.outputs[0] for output in outputs]


def whole_text(tokenizer, **arguments):
    last = run(tokenizer, ignore_eos=True, **arguments)[-1]
    assert last.text == tokenizer.decode(last.token_ids)
    return last.text


def test_each_step_has_the_text_so_far(tokenizer):
    outputs = run(tokenizer, ignore_eos=True)
    for count, output in enumerate(outputs, start=1):
        assert output.text == tokenizer.decode(output.token_ids[:count])
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("seed", range(8))
def test_a_stop_string_across_tokens_ends_the_text_before_it(tokenizer, seed):
    arguments = {"temperature": 1.0, "seed": seed}
    text = whole_text(tokenizer, **arguments)
    stop = text[7:11]
    outputs = run(tokenizer, ignore_eos=True, stop=["absent", stop], **arguments)
    last = outputs[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert last.text == text[: text.index(stop)]
    # It ends with the token that completes the string, and no earlier.
    assert stop in tokenizer.decode(last.token_ids)
    assert stop not in tokenizer.decode(last.token_ids[:-1])
    for output in outputs:
        assert last.text.startswith(output.text)


def test_a_stop_string_that_the_last_allowed_token_completes_is_the_reason(tokenizer):
    text = whole_text(tokenizer, max_tokens=6)
    last = run(tokenizer, ignore_eos=True, max_tokens=6, stop=text[-2:])[-1]
    assert len(last.token_ids) == 6
    assert (last.text, last.finish_reason) == (text[:-2], "stop")


def test_text_held_back_for_a_stop_string_is_given_at_the_end(tokenizer):
    text = whole_text(tokenizer, max_tokens=6)
    outputs = run(tokenizer, ignore_eos=True, max_tokens=6, stop=text[-2:] + "never")
    assert outputs[-2].text == text[:-2]
    assert (outputs[-1].text, outputs[-1].finish_reason) == (text, "length")


@pytest.mark.parametrize("kind", ["eos", "stop_token_ids"])
def test_the_token_that_stops_is_not_in_the_text(tokenizer, kind):
    tokens = run(tokenizer, ignore_eos=True)[-1].token_ids
    token_id = tokens[5]
    before = tokens[: tokens.index(token_id)]
    if kind == "eos":
        last = run(tokenizer, eos_token_ids=[token_id])[-1]
    else:
        last = run(tokenizer, ignore_eos=True, stop_token_ids=[token_id])[-1]
    assert last.token_ids == [*before, token_id]
    assert last.text == tokenizer.decode(before)
    assert last.stop_reason == (None if kind == "eos" else token_id)


def test_an_aborted_request_keeps_its_text(tokenizer):
    engine = Engine(FakeRunner(vocab_size=len(PIECES)), tokenizer)
    engine.add_request("a", PROMPT, SamplingParams(temperature=0, stop="absent"))
    for _ in range(4):
        engine.step()
    completion = engine.abort_request("a").outputs[0]
    assert completion.finish_reason == "abort"
    assert completion.text == tokenizer.decode(completion.token_ids)
    assert completion.text


def test_logprobs_have_the_text_of_their_tokens(tokenizer):
    last = run(tokenizer, ignore_eos=True, logprobs=3)[-1]
    for entries in last.logprobs:
        for token_id, entry in entries.items():
            assert entry.decoded_token == tokenizer.decode([token_id], skip_special_tokens=False)
    assert any(EOS in entries for entries in last.logprobs)  # a special token has text here
