"""Tokenizer against transformers on the same files."""

import json

import pytest

from moecore.tokenizer import Tokenizer
from tokenizer_backends import BACKENDS, CORPUS, byte_level, each_tokenizer, plain

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
