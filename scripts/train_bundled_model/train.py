"""Trains the bundled model within a time limit.

    python scripts/train_bundled_model/train.py DATA OUT --minutes 8.5 --runs 0.1,0.3 0.2,0.3

DATA is prepare.py's output. The runs of --runs share the time; the learning rate of each falls to
zero at its end. OUT/model always holds the model with the lowest validation loss so far, and
OUT/metrics.json what is known so far: a training that is cut off leaves both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import PROMPTS, sample, validate
from export import difference_from_transformers, round_weights
from model import ModelConfig, Qwen3Moe
from record import Record
from tokenizers import Tokenizer
from torch import Tensor
from trainer import Settings, Trainer

LOGIT_TOLERANCE = 1e-3  # float32 against float32, of logits around 10
SAMPLE_TOKENS = 200


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.5, help="of training, with compilation")
    parser.add_argument(
        "--runs", nargs="+", default=["0.1,0.3"], help="DROPOUT,WEIGHT_DECAY of each run"
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--validate-seconds", type=float, default=8.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--compile",
        choices=["on", "off", "auto"],
        default="auto",
        help="auto: on a GPU, if it works",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run_settings(arguments: argparse.Namespace) -> list[Settings]:
    """The settings of each run."""
    settings = []
    for run in arguments.runs:
        try:
            dropout, weight_decay = map(float, run.split(","))
        except ValueError:
            message = f"train: --runs must be pairs DROPOUT,WEIGHT_DECAY, got {run}"
            raise SystemExit(message) from None
        settings.append(
            Settings(
                dropout=dropout,
                weight_decay=weight_decay,
                learning_rate=arguments.learning_rate,
                batch=arguments.batch,
                context=arguments.context,
                compile=arguments.compile,
                validate_seconds=arguments.validate_seconds,
                seed=arguments.seed,
            )
        )
    return settings


def read_tokens(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))


def finish(record: Record, data: Path, model: Qwen3Moe, final: dict[str, Any]) -> bool:
    """Records and prints what the stored model does; returns whether transformers agrees."""
    record.metrics["final"] = final
    print(json.dumps({k: v for k, v in final.items() if k != "expert_load"}), flush=True)
    for i, load in enumerate(final["expert_load"]):
        print(f"layer {i}: share of each expert", *(f"{share:.3f}" for share in load))
    record.write()

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    record.metrics["samples"] = []
    for i, prompt in enumerate(PROMPTS):
        text = sample(model, tokenizer, prompt, SAMPLE_TOKENS, seed=i)
        record.metrics["samples"].append(text)
        print(f"\n--- {text}", flush=True)
    record.write()

    tokens = read_tokens(data / "valid.bin")[:256].view(1, -1)
    difference = difference_from_transformers(model, record.out / "model", tokens)
    record.metrics["logit_difference_from_transformers"] = difference
    print(f"\nlargest difference of a logit from transformers': {difference:.2g}", flush=True)
    return difference < LOGIT_TOLERANCE


def main() -> None:
    begin = time.perf_counter()
    arguments = parse_arguments()
    runs = run_settings(arguments)
    sizes = json.loads((arguments.data / "data.json").read_text())
    config = ModelConfig()
    if sizes["vocab_size"] != config.vocab_size:
        raise SystemExit(
            f"train: vocab_size must be {config.vocab_size}, got {sizes['vocab_size']}"
        )
    if not 1 <= arguments.context <= config.max_position_embeddings:
        raise SystemExit(
            f"train: --context must be in 1 .. {config.max_position_embeddings}, "
            f"got {arguments.context}"
        )
    device = torch.device(arguments.device)
    train_tokens, valid_tokens = (
        read_tokens(arguments.data / f"{split}.bin").to(device) for split in ("train", "valid")
    )

    def valid(model: Qwen3Moe) -> dict[str, Any]:
        return validate(model, valid_tokens, sizes["valid"]["bytes"], arguments.context)

    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    record = Record(arguments.out, device, settings, sizes["eos_token_id"])
    print(f"{record.metrics['card']}, torch {torch.__version__}", flush=True)
    end = begin + arguments.minutes * 60
    for i, run in enumerate(runs):
        before = time.perf_counter()
        trainer = Trainer(run, train_tokens)
        now = time.perf_counter()
        facts = {"compiled": trainer.compiled, "start_seconds": now - before}
        print(f"run {i}: {run}, {facts}", flush=True)
        record.start_run({**run._asdict(), **facts})
        share = (end - now) / (len(runs) - i)
        trainer.run(now + share, lambda model: valid(model)["loss_per_token"], record)
        del trainer

    model = Qwen3Moe(config).to(device)
    model.load_state_dict(record.best_weights)
    round_weights(model)
    agrees = finish(record, arguments.data, model, valid(model))
    record.metrics["wall_seconds"] = time.perf_counter() - begin
    record.write()
    print(f"done in {record.metrics['wall_seconds']:.0f} s: {arguments.out}", flush=True)
    if not agrees:
        raise SystemExit(f"train: the logit difference must be below {LOGIT_TOLERANCE}")


if __name__ == "__main__":
    main()
