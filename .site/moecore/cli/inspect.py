"""`moecore inspect`: what a model is and how much memory it takes, without loading its weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_EP_SIZES = (1, 2, 4, 8)


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help="show a model's size and the memory it takes",
        description="Show a model's family, parameters, bytes, and the memory that it takes on each"
        " rank of an expert-parallel group. Reads config.json and, where they are, the headers of"
        " the weights; downloads no weights.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder or a hub id (default: the model in the package)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from moecore.hub import resolve_model

    facts = inspect_model(resolve_model(args.model, args.revision, weights=False))
    if args.json:
        print(json.dumps(facts))
    else:
        _show(facts)
    return 0


def inspect_model(folder: Path) -> dict[str, Any]:
    """What `moecore inspect --json` prints."""
    from moecore import model_size
    from moecore.checkpoint import Checkpoint, holds_checkpoint
    from moecore.config import read_config

    config = read_config(folder)
    implied = model_size.count_parameters(config)
    dtype = str(config.dtype).removeprefix("torch.")
    if holds_checkpoint(folder):
        checkpoint = Checkpoint.open(folder)
        parameters = model_size.checkpoint_parameters(checkpoint)
        sizes = model_size.checkpoint_bytes(checkpoint)
        by_dtype = model_size.bytes_by_dtype(checkpoint)
    else:
        checkpoint, parameters, width = None, implied, config.dtype.itemsize
        sizes = model_size.Size(implied.experts * width, implied.rest * width)
        by_dtype = {dtype: sizes.total}
    moe = config.moe
    return {
        "folder": str(folder),
        "model_type": config.model_type,
        "routing_class": moe.routing_class,
        "num_layers": config.num_layers,
        "num_moe_layers": sum(config.moe_layers),
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "source": "config" if checkpoint is None else "checkpoint",
        "parameters": parameters.total,
        "active_parameters": model_size.active_parameters(parameters, config),
        "config_parameters": implied.total,
        "bytes_by_dtype": by_dtype,
        "dtype": dtype,
        "kv_bytes_per_token": model_size.kv_bytes_per_token(config),
        "bytes_per_rank": {
            str(ep): model_size.bytes_per_rank(sizes, moe.num_experts, ep)
            for ep in _EP_SIZES
            if ep <= moe.num_experts
        },
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    counted = {
        "checkpoint": "counted in the checkpoint's headers",
        "config": "computed from config.json: the folder holds no weights",
    }[facts["source"]]
    by_dtype = [f"{name} {_bytes(size)}" for name, size in facts["bytes_by_dtype"].items()]
    dense = facts["num_layers"] - facts["num_moe_layers"]
    rows = {
        "folder": facts["folder"],
        "family": f"{facts['model_type']}, routing {facts['routing_class']}",
        "layers": f"{facts['num_layers']}" + (f", {dense} of them dense" if dense else ""),
        "experts": f"{facts['num_experts']} a layer, {facts['top_k']} for each token",
        "parameters": f"{_count(facts['parameters'])}, "
        f"{_count(facts['active_parameters'])} active for each token",
        "weights": f"{', '.join(by_dtype)} ({counted})",
        "KV cache": f"{facts['kv_bytes_per_token']:,} bytes for each token in {facts['dtype']}",
    }
    if facts["parameters"] != facts["config_parameters"]:
        rows["note"] = (
            f"config.json implies {facts['config_parameters']:,} parameters, the checkpoint holds "
            f"{facts['parameters']:,}"
        )
    for ep_size, size in facts["bytes_per_rank"].items():
        rows[f"EP {ep_size}"] = f"{_bytes(size)} of weights on each rank"
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False, markup=False, soft_wrap=True).print(table)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"
