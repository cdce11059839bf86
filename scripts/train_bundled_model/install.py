"""Puts a trained model, its tokenizer and a model card where the package keeps its bundled model.

    python scripts/train_bundled_model/install.py DATA OUT [FOLDER]

DATA is prepare.py's output, OUT train.py's; FOLDER is python/moecore/bundled if not given.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from optimizer import TABLE_DECAY

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parents[1] / "python" / "moecore" / "bundled"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_WEIGHT_BYTES = 17_000_000


def parameter_counts(config: dict[str, Any]) -> tuple[int, int]:
    """Parameters in all, and those at work on one token."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    expert = 3 * hidden * config["moe_intermediate_size"]
    common = config["vocab_size"] * hidden + hidden
    layer = 2 * hidden * (queries + keys) + config["num_experts"] * hidden
    layer += 2 * hidden + 2 * config["head_dim"]
    common += layers * layer
    return (
        common + layers * config["num_experts"] * expert,
        common + layers * config["num_experts_per_tok"] * expert,
    )


def model_card(config: dict[str, Any], metrics: dict[str, Any], sizes: dict[str, Any]) -> str:
    best, final = metrics["best"], metrics["final"]
    run = metrics["runs"][best["run"]]
    loads = [share for layer in final["expert_load"] for share in layer]
    total, active = parameter_counts(config)
    text = (
        (HERE / "model_card.md")
        .read_text()
        .format(
            **{
                **config,
                **best,
                **final,
                **{k: run[k] for k in ("batch", "context", "learning_rate")},
            },
            dropout=run["dropout"],
            weight_decay=run["weight_decay"],
            table_decay=min(run["weight_decay"], TABLE_DECAY),
            wall_seconds=metrics["wall_seconds"],
            logit_difference=metrics["logit_difference_from_transformers"],
            parameters=total / 1e6,
            active=active / 1e6,
            least=min(loads),
            most=max(loads),
            sample=metrics["samples"][0].strip().replace("\n", "\n> "),
            card=metrics["card"],
            torch=metrics["torch"],
            rate=best["tokens_per_second"] / 1e6,
            train_tokens=sizes["train"]["tokens"],
            valid_tokens=sizes["valid"]["tokens"],
            valid_bytes=sizes["valid"]["bytes"],
        )
    )
    return text + (HERE / "sources.md").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=BUNDLED)
    arguments = parser.parse_args()

    size = (arguments.out / "model" / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise SystemExit(
            f"install: model.safetensors must have at most {MAX_WEIGHT_BYTES} bytes, got {size}"
        )
    config, metrics, sizes = (
        json.loads(path.read_text())
        for path in (
            arguments.out / "model" / "config.json",
            arguments.out / "metrics.json",
            arguments.data / "data.json",
        )
    )
    card = model_card(config, metrics, sizes)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(arguments.out / "model" / name, arguments.folder / name)
    for name in TOKENIZER_FILES:
        shutil.copyfile(arguments.data / name, arguments.folder / name)
    (arguments.folder / "README.md").write_text(card)
    print(f"{arguments.folder}: {size} bytes of weights")


if __name__ == "__main__":
    main()
