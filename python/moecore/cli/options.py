"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moecore.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moecore.llm import LLM
    from moecore.outputs import RequestOutput


class UsageError(Exception):
    """The command line asks for what cannot be done; shown with the command's usage."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="M", help="a folder or a hub id (default: the model in the package)"
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens of a prompt and its completion"
    )
    group.add_argument(
        "--ep", type=int, default=1, metavar="N", help="ranks that share out the experts"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show timings, and where an error arose"
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The arguments of SamplingParams, by their names; those not given keep their defaults."""
    group = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    count: dict[str, Any] = {"type": int, "metavar": "N"}
    group.add_argument("--temperature", **number, help="0 takes the likeliest token (default: 1)")
    group.add_argument("--top-p", **number, help="likeliest tokens that reach this probability")
    group.add_argument("--top-k", **count, help="the N likeliest tokens")
    group.add_argument("--min-p", **number, help="tokens this likely, relative to the likeliest")
    group.add_argument("--repetition-penalty", **number, help="above 1 discourages repetition")
    group.add_argument("--seed", **count, help="the same seed gives the same text")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument(
        "--stop-token-ids", type=int, nargs="+", metavar="ID", help="end at one of these tokens"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on past the model's end of text"
    )
    group.add_argument(
        "--max-tokens",
        **count,
        default=max_tokens,
        help=f"most new tokens (default: {max_tokens})",
    )
    group.add_argument("--min-tokens", **count, help="do not end before so many new tokens")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """SamplingParams of the options given.

    Raises:
        UsageError: a value is out of range.
    """
    names = {field.name for field in fields(SamplingParams)}
    try:
        return SamplingParams(**{k: v for k, v in vars(args).items() if k in names})
    except ValueError as error:
        raise UsageError(str(error).removeprefix("SamplingParams: ")) from None


def load(args: argparse.Namespace) -> tuple[LLM, float]:
    """The model of the options, and the seconds it took to be ready."""
    start = time.monotonic()
    from moecore.llm import LLM

    llm = LLM(
        args.model,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        expert_parallel_size=args.ep,
        use_tqdm=sys.stderr.isatty(),
    )
    return llm, time.monotonic() - start


def rates(output: RequestOutput) -> dict[str, float | int | None]:
    """Counts and rates of a finished request; a rate that nothing was measured for is None."""
    metrics = output.metrics
    new_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    prefill = decode = None
    if metrics is not None and metrics.first_token_time is not None:
        prefill = metrics.first_token_time - metrics.arrival_time
        if metrics.finished_time is not None and new_tokens > len(output.outputs):
            decode = metrics.finished_time - metrics.first_token_time
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "new_tokens": new_tokens,
        "prefill_tokens_per_second": len(output.prompt_token_ids) / prefill if prefill else None,
        "decode_tokens_per_second": (
            (new_tokens - len(output.outputs)) / decode if decode else None
        ),
    }


def show_timings(output: RequestOutput, load_seconds: float | None = None) -> None:
    """One line on stderr."""
    from rich.console import Console

    counts = rates(output)
    parts = [] if load_seconds is None else [f"load {load_seconds:.2f} s"]
    for what in ("prefill", "decode"):
        rate = counts[f"{what}_tokens_per_second"]
        if rate is not None:
            tokens = counts["prompt_tokens" if what == "prefill" else "new_tokens"]
            parts.append(f"{what} {tokens} tokens, {rate:.1f} tok/s")
    parts.append(f"ended by {output.outputs[0].finish_reason}" if output.outputs else "no output")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(" | ".join(parts), style="dim", markup=False)
