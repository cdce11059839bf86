"""The model inside the package: its files, its tokenizer, and that it has learnt English."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moecore

transformers = pytest.importorskip("transformers", minversion="5.20")

FOLDER = Path(moecore.__file__).parent / "bundled"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").exists(), reason="no bundled weights in this checkout"
)

MAX_WEIGHT_BYTES = 17_000_000
MAX_PERPLEXITY_PER_BYTE = 2.50  # measured on PASSAGE: 2.426
LEAST_LOAD = 0.01  # of a layer's choices, for each of 8 experts, on PASSAGE

# The opening of John Ruskin's "The King of the Golden River" (1842), which training never saw.
PASSAGE = """\
In a secluded and mountainous part of Stiria there was, in old time, a valley of the most \
surprising and luxuriant fertility. It was surrounded, on all sides, by steep and rocky \
mountains, rising into peaks, which were always covered with snow, and from which a number of \
torrents descended in constant cataracts. One of these fell westward, over the face of a crag so \
high, that, when the sun had set to everything else, and all below was darkness, his beams still \
shone full upon this waterfall, so that it looked like a shower of gold. It was, therefore, \
called by the people of the neighbourhood, the Golden River.

The youngest brother, Gluck, was as completely opposed, in both appearance and character, to his \
seniors as could possibly be imagined or desired. He was not above twelve years old, fair, \
blue-eyed, and kind in temper to every living thing. He did not, of course, agree particularly \
well with his brothers, or rather, they did not agree with him. He was usually appointed to the \
honourable office of turnspit, when there was anything to roast, which was not often; for, to do \
the brothers justice, they were hardly less sparing upon themselves than upon other people.

"It must be the wind," said Gluck; "nobody else would venture to knock double knocks at our \
door."
"""
COMMON_WORDS = """
a all an and as at be but by for from had have he her him his i in is it little my not of on one
out said she so that the their them then there they this to was went were when who with you
"""


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_files_are_whole_and_small():
    assert {path.name for path in FOLDER.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (FOLDER / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
    assert (FOLDER / "tokenizer.json").stat().st_size < 500_000


def test_config_says_qwen3_moe_and_agrees_with_the_tokenizer(tokenizer):
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["norm_topk_prob"] is True
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == len(tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_model_card_names_licence_and_sources():
    card = (FOLDER / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "public domain" in card
    assert card.count("\n- ") == 55  # a line an author


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n  \t",
        " a ",
        "naïve café",
        "日本語",
        "🙂👍🏽",
        "\x00\x7f",
        "1,234.5",
        "don't !",
    ],
)
def test_awkward_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_english_takes_more_than_three_bytes_a_token(tokenizer):
    assert len(PASSAGE) / len(tokenizer.encode(PASSAGE)) > 3.0


def test_perplexity_on_unseen_text_and_every_expert_at_work(tokenizer, model):
    ids = torch.tensor([tokenizer.encode(PASSAGE)])
    choices = []

    def note(module, arguments, output):
        choices.append(output[2])  # [T, k] ids

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    for hook in hooks:
        hook.remove()

    nats_per_byte = loss * (ids.shape[1] - 1) / len(PASSAGE.encode())
    assert math.exp(nats_per_byte) < MAX_PERPLEXITY_PER_BYTE
    assert len(choices) == model.config.num_hidden_layers
    for layer in choices:
        load = layer.flatten().bincount(minlength=model.config.num_experts) / layer.numel()
        assert load.min() > LEAST_LOAD


@pytest.mark.parametrize("prompt", ["Once upon a time", "The old woman opened the door and"])
def test_greedy_text_is_ascii_english(tokenizer, model, prompt):
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            temperature=None,
            top_p=None,
        )
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert text.isascii()
    words = [word.strip("\".,;:!?'-").lower() for word in text.split()]
    common = COMMON_WORDS.split()
    assert len(words) > 20
    assert sum(word in common for word in words) / len(words) > 0.3
    assert len(set(words)) > 10
