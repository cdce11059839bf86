"""Tokenizer against transformers on the same files; TextStream against decoding everything."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moecore.tokenizer import TextStream, Tokenizer

CORPUS = [
    "Once upon a time there was a little fox who lived in the forest.",
    "Äpfel und Birnen, naïve cafés; 日本語のテキスト 🦊🌲 and 👩‍👩‍👧 too.",
    'if (x > 0) {\n    return "END";\n}\n',
]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(CORPUS))

CHATML = """{%- if messages[0].role == 'system' %}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}
{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}|{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""

LLAMA = """{{ bos_token }}{% set ns = namespace(turns=0) %}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}
{% set ns.turns = ns.turns + 1 %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}{{ ns.turns }}
{{ strftime_now('%Y') }}"""


def byte_level():
    """As Qwen's and the bundled model's: bytes as characters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def byte_fallback():
    """As Mixtral's: pieces of SentencePiece, and a token for each byte."""
    words = ["▁", "▁Once", "▁upon", "▁a", "▁time", *"▁Onceupatimlfxrdbso.,;"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + words:
        vocab.setdefault(token, len(vocab))
    merges = []
    for word in words:
        for i in range(1, len(word)):
            vocab.setdefault(word[: i + 1], len(vocab))
            merges.append((word[:i], word[i]))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


BACKENDS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}
each_tokenizer = pytest.mark.parametrize("name", BACKENDS)


def write_folder(folder, backend, template=CHATML, **config):
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True, "__type": "AddedToken"},
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def plain(name):
    return Tokenizer(BACKENDS[name])


@each_tokenizer
def test_text_and_ids_are_those_of_transformers(tmp_path, name):
    folder = write_folder(tmp_path, BACKENDS[name])
    ours, reference = Tokenizer.from_folder(folder), theirs(folder)
    for text in [*CORPUS, "", "<|im_start|>user\nhi<|im_end|>"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special)
            for skip in (True, False):
                want = reference.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == want
    assert ours.bos_token_id == reference.bos_token_id == ours.encode("x")[0]
    assert ours.eos_token_id == reference.eos_token_id
    assert ours.vocab_size == len(reference)
    assert ours.token_text(ours.eos_token_id) == "</s>"


CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hi <b>"}],
    "three turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": "Bye"},
    ],
    "system": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "a <b> & 'ü'", "parameters": {"type": "object"}},
    }
]


@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS}, {"enable_thinking": False}])
@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_chat_prompts_are_those_of_transformers(tmp_path, messages, generation, variables):
    folder = write_folder(tmp_path, BACKENDS["byte-level"])
    want = theirs(folder).apply_chat_template(
        messages, add_generation_prompt=generation, tokenize=False, **variables
    )
    ours = Tokenizer.from_folder(folder)
    assert ours.apply_chat_template(messages, generation, **variables) == want


@pytest.mark.parametrize("place", ["key", "file", "list"])
def test_templates_are_found_wherever_they_lie(tmp_path, place):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": LLAMA}]
    key = {"key": LLAMA, "file": "not this one", "list": named}[place]
    folder = write_folder(tmp_path, BACKENDS["byte-level"], key)
    if place == "file":
        (folder / "chat_template.jinja").write_text(LLAMA, encoding="utf-8")
    ours = Tokenizer.from_folder(folder)
    messages = CONVERSATIONS["three turns"]
    got = ours.apply_chat_template(messages)
    assert got == theirs(folder).apply_chat_template(messages, tokenize=False)
    assert got.startswith("<s>")
    if place == "list":
        assert ours.apply_chat_template(messages, tools=TOOLS) == "T"


def test_a_refusal_of_the_template_is_its_own_words(tmp_path):
    ours = Tokenizer.from_folder(write_folder(tmp_path, BACKENDS["byte-level"], LLAMA))
    with pytest.raises(ValueError, match=r"^chat template: Roles must alternate user/assistant$"):
        ours.apply_chat_template([{"role": "assistant", "content": "Hi"}])
    with pytest.raises(ValueError, match="chat template: can only concatenate str"):
        ours.apply_chat_template([{"role": "user", "content": None}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(tmp_path, attack):
    ours = Tokenizer.from_folder(write_folder(tmp_path, BACKENDS["byte-level"], attack))
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="chat template: .*(unsafe|undefined)"):
        ours.apply_chat_template(messages)
    assert len(messages) == 1


def test_no_template_is_an_error_that_says_so(tmp_path):
    ours = Tokenizer.from_folder(write_folder(tmp_path, BACKENDS["byte-level"], None))
    with pytest.raises(ValueError, match="this model has no chat template"):
        ours.apply_chat_template([])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "must be valid jinja, got line 1"),
        ([{"name": "a", "template": "A"}, {"name": "b", "template": "B"}], "named default, got a"),
        (7, "must be a text, or a list of objects with name and template, got 7"),
        ([{"name": "a"}], "must be a text, or a list of objects"),
    ],
)
def test_bad_templates_are_errors(tmp_path, template, message):
    folder = write_folder(tmp_path, BACKENDS["byte-level"], template)
    with pytest.raises(ValueError, match=f"chat template: .*{message}"):
        Tokenizer.from_folder(folder).apply_chat_template([])


def test_a_missing_tokenizer_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no tokenizer.json in {tmp_path}; download it"):
        Tokenizer.from_folder(tmp_path)


def test_broken_files_are_named(tmp_path):
    folder = write_folder(tmp_path, BACKENDS["byte-level"])
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must hold an object, got list"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must be JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json must be a tokenizer file"):
        Tokenizer.from_folder(folder)


def test_a_tokenizer_that_cuts_and_pads_for_training_does_not_here(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    ours = Tokenizer.from_folder(write_folder(tmp_path, backend))
    assert ours.encode(CORPUS[0]) == plain("byte-level").encode(CORPUS[0])


def test_special_tokens_come_from_the_map_where_the_config_has_none(tmp_path):
    folder = write_folder(tmp_path, BACKENDS["byte-level"], eos_token=None)
    assert Tokenizer.from_folder(folder).eos_token_id is None
    write_folder(tmp_path, BACKENDS["byte-level"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert Tokenizer.from_folder(folder).eos_token_id == 1


# --- TextStream ---


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
