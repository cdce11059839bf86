"""TextStream against decoding everything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecore.tokenizer import TextStream
from tokenizer_backends import CORPUS, REPLACEMENT, TEXTS, each_tokenizer, plain


def pieces_of(stream, ids):
    pieces = [stream.push(token_id) for token_id in ids]
    return [*pieces, stream.finish()]


@each_tokenizer
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_pieces_add_up_to_the_text_of_all_tokens(name, text):
    tokenizer = plain(name)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = pieces_of(stream, ids)
    assert "".join(pieces) == stream.text == tokenizer.decode(ids)


@given(data=st.lists(st.integers(0, 399), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_tokens_give_the_text_of_all(data):
    tokenizer = plain("byte-level")
    data = [token_id for token_id in data if token_id < tokenizer.vocab_size]
    assert "".join(pieces_of(TextStream(tokenizer), data)) == tokenizer.decode(data)


@each_tokenizer
def test_no_piece_holds_half_a_character(name):
    tokenizer = plain(name)
    ids = tokenizer.encode("a😀ß🚀", add_special_tokens=False)
    pieces = pieces_of(TextStream(tokenizer), ids)
    assert len(pieces) > 9
    assert [piece for piece in pieces if piece.strip()] == ["a", "😀", "ß", "🚀"]


def test_bytes_that_are_no_text_do_not_hold_it_back():
    tokenizer = plain("byte-level")
    [continuation] = {tokenizer.encode("🦊", add_special_tokens=False)[-1]}
    stream = TextStream(tokenizer)
    for _ in range(200):
        stream.push(continuation)
    assert len(stream.text) > 180
    assert set(stream.text) == {REPLACEMENT}


def test_the_cost_of_a_token_does_not_grow_with_the_text():
    tokenizer = plain("byte-level")
    decoded = []

    class Counting:
        def decode(self, ids, skip_special_tokens=True):
            decoded.append(len(ids))
            return tokenizer.decode(ids, skip_special_tokens)

    stream = TextStream(Counting(), stop=["never"])
    ids = tokenizer.encode(CORPUS[1] * 20) + [0] * 100
    for token_id in ids:
        stream.push(token_id)
    assert max(decoded) <= 6 + 16
    assert len(decoded) <= 2 * len(ids) + 10


def test_a_prompt_keeps_the_space_before_the_first_word():
    tokenizer = plain("byte-fallback")
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False)
    for cut in range(1, len(ids)):
        stream = TextStream(tokenizer, prompt_token_ids=ids[:cut])
        text = "".join(pieces_of(stream, ids[cut:]))
        assert tokenizer.decode(ids[:cut]) + text == "Once upon a time"


@each_tokenizer
def test_a_prompt_of_any_end_leaves_whole_characters(name):
    tokenizer = plain(name)
    ids = tokenizer.encode("a🦊🦊🦊é🌲 x", add_special_tokens=False)
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        if name == "byte-fallback" and before.endswith(REPLACEMENT):
            continue  # one unfinished character makes this decoder give up all those beside it
        stream = TextStream(tokenizer, prompt_token_ids=ids[:cut])
        rest = "".join(pieces_of(stream, ids[cut:]))
        # A character that begins in the prompt and ends here belongs here.
        assert before.rstrip(REPLACEMENT) + rest == "a🦊🦊🦊é🌲 x"


def test_tokens_without_text_do_not_hide_what_came_before():
    tokenizer = plain("byte-fallback")
    once, upon = (tokenizer.encode(word, add_special_tokens=False) for word in ("Once", "upon"))
    stream = TextStream(tokenizer)
    # Its decoder drops the space of a first word, and this is none.
    assert "".join(pieces_of(stream, [*once, *[2] * 40, *upon])) == "Once upon"


class Words:
    """A tokenizer whose tokens are these words."""

    def __init__(self, *words):
        self.words = words

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.words[token_id] for token_id in ids)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["cd", "b"], "a", "b"),
        (["bcd", "c", "ef"], "ab", "c"),
        (["bc", "abc", "c"], "", "abc"),
    ],
)
def test_of_stop_strings_in_one_token_the_first_complete_one_ends_the_text(stop, text, reason):
    stream = TextStream(Words("abcdef"), stop=stop)
    assert (stream.push(0), stream.text, stream.stop_reason) == (text, text, reason)


def cut_at_stop(text, stop):
    """What stop strings leave of a text, character by character."""
    for end in range(1, len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], string
    return text, None


@each_tokenizer
@given(
    text=st.one_of(st.text(alphabet="abé🦊", max_size=30), TEXTS),
    stop=st.lists(st.text(alphabet="abé🦊 ", min_size=1, max_size=4), max_size=3, unique=True),
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_stop_string_that_is_complete_first(name, text, stop):
    tokenizer = plain(name)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, stop=stop)
    given = ""
    want, reason = cut_at_stop(tokenizer.decode(ids), stop)
    for token_id in ids:
        given += stream.push(token_id)
        assert given == stream.text
        assert want.startswith(given)
    given += stream.finish()
    assert (given, stream.text, stream.stop_reason) == (want, want, reason)


def test_the_beginning_of_a_stop_string_is_held_back_and_then_given():
    tokenizer = plain("byte-level")
    stream = TextStream(tokenizer, stop=["END!"])
    for character in "aEN":
        [token_id] = tokenizer.encode(character, add_special_tokens=False)
        stream.push(token_id)
    assert stream.text == "a"
    stream.push(tokenizer.encode("x", add_special_tokens=False)[0])
    assert stream.text == "aENx"


def test_nothing_comes_after_a_stop_string():
    tokenizer = plain("byte-level")
    ids = tokenizer.encode("one END two", add_special_tokens=False)
    stream = TextStream(tokenizer, stop=["END"])
    assert "".join(pieces_of(stream, ids)) == "one "
    assert stream.push(ids[0]) == stream.finish() == ""
    assert stream.stop_reason == "END"
