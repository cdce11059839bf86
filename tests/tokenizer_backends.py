"""Tokenizers of both kinds, trained on a few lines."""

import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moecore.tokenizer import Tokenizer

CORPUS = [
    "Once upon a time there was a little fox who lived in the forest.",
    "Äpfel und Birnen, naïve cafés; 日本語のテキスト 🦊🌲 and 👩‍👩‍👧 too.",
    'if (x > 0) {\n    return "END";\n}\n',
]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(CORPUS))


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


def plain(name):
    return Tokenizer(BACKENDS[name])
