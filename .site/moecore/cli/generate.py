"""`moecore generate`: complete a text."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moecore.cli.options import (
    UsageError,
    add_model_options,
    add_sampling_options,
    load,
    rates,
    sampling_params,
    show_timings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moecore.outputs import RequestOutput

_MAX_TOKENS = 200


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "generate",
        help="complete a text",
        description="Complete a text; the completion comes on stdout as it is made.",
        epilog='example: moecore generate "Once upon a time" --temperature 0.7 --top-p 0.9',
    )
    parser.add_argument("prompt", nargs="?", help="the text; - or nothing reads it from stdin")
    parser.add_argument("--echo", action="store_true", help="print the prompt, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens=_MAX_TOKENS)
    for option, text in (
        ("--n", "completions, with --json"),
        ("--logprobs", "log-probabilities of the N likeliest tokens at each step, with --json"),
    ):
        parser.add_argument(option, type=int, metavar="N", default=argparse.SUPPRESS, help=text)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if not args.json and (hasattr(args, "n") or hasattr(args, "logprobs")):
        raise UsageError("--n and --logprobs need --json")
    params = sampling_params(args)
    prompt = _read_prompt(args.prompt)
    llm, load_seconds = load(args)
    with llm:
        if args.json:
            output = llm.generate([prompt], params, use_tqdm=False)[0]
            print(json.dumps(_as_json(output, load_seconds), ensure_ascii=False))
        else:
            if args.echo:
                sys.stdout.write(prompt)
            output = print_stream(llm.stream(prompt, params))
    if args.verbose or sys.stderr.isatty():
        show_timings(output, load_seconds)
    return 0


def print_stream(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """Print a completion as it comes, and a line's end; returns the last output."""
    text = ""
    for output in outputs:
        sys.stdout.write(output.outputs[0].text[len(text) :])
        sys.stdout.flush()
        text = output.outputs[0].text
    if not text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return output


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise UsageError("a prompt is needed, as an argument or on stdin")
    if prompt is None or prompt == "-":
        prompt = sys.stdin.read()
    return prompt


def _as_json(output: RequestOutput, load_seconds: float) -> dict[str, Any]:
    result = asdict(output)
    del result["metrics"], result["finished"]
    return result | {"timings": {"load_seconds": load_seconds, **rates(output)}}
