"""Corpus -> tokenizer and token files: what train.py reads.

    python scripts/train_bundled_model/prepare.py CORPUS DATA

CORPUS holds train.txt.xz and valid.txt.xz: documents separated by a line <|endoftext|> with a blank
line on each side. Writes into DATA: tokenizer.json, tokenizer_config.json, train.bin and valid.bin
(uint16 tokens, an end-of-document token after every document) and data.json (sizes).
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_DOCUMENT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 1024
# Words with the space before them, single digits, punctuation, runs of newlines, other white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def read_documents(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    documents = [part.strip("\n") for part in text.split(f"\n{END_OF_DOCUMENT}\n")]
    if not all(documents) or any(END_OF_DOCUMENT in document for document in documents):
        raise ValueError(f"{path}: separators must stand alone, between documents")
    return documents


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE: every byte is a token, so that every text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    return {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_DOCUMENT,
        "model_max_length": CONTEXT,
        "pad_token": END_OF_DOCUMENT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)

    splits = {
        name: read_documents(arguments.corpus / f"{name}.txt.xz") for name in ("train", "valid")
    }
    tokenizer = train_tokenizer(splits["train"])
    tokenizer.save(str(arguments.data / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2) + "\n"
    (arguments.data / "tokenizer_config.json").write_text(config)

    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    sizes: dict[str, object] = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": end}
    for name, documents in splits.items():
        encodings = tokenizer.encode_batch_fast(documents)
        ids = np.concatenate([np.array([*e.ids, end], dtype=np.uint16) for e in encodings])
        (arguments.data / f"{name}.bin").write_bytes(ids.tobytes())
        size = sum(len(document.encode()) for document in documents)
        sizes[name] = {"documents": len(documents), "bytes": size, "tokens": len(ids)}
        print(f"{name}: {len(documents)} documents, {size} bytes, {len(ids)} tokens")
    (arguments.data / "data.json").write_text(json.dumps(sizes, indent=2) + "\n")


if __name__ == "__main__":
    main()
