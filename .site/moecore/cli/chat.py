"""`moecore chat`: a conversation, in the model's own chat template."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from moecore.cli.generate import print_stream
from moecore.cli.options import (
    add_model_options,
    add_sampling_options,
    load,
    sampling_params,
    show_timings,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moecore.llm import LLM
    from moecore.outputs import RequestOutput
    from moecore.sampling_params import SamplingParams

_MAX_TOKENS = 1024
_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C cuts an answer short"


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model. From a pipe, each line of stdin is one message.",
        epilog=f"in a terminal: {_HELP}",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told to be")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens=_MAX_TOKENS)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    params = sampling_params(args)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    llm, _ = load(args)
    with llm:
        if llm.tokenizer.chat_template is None:
            raise ValueError("chat: this model has no chat template; use moecore generate")
        conversation = Conversation(llm, params, args.system)
        if interactive:
            print(_HELP, file=sys.stderr)
        for message in _messages(interactive):
            if interactive and message in ("/exit", "/quit"):
                break
            if interactive and message == "/reset":
                conversation.reset()
                continue
            output = conversation.answer(message, interactive=interactive)
            if output is not None and args.verbose:
                show_timings(output)
    return 0


class Conversation:
    """What was said so far, and the model that answers."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's text."""
        self._messages = list(self._system)

    def answer(self, message: str, *, interactive: bool) -> RequestOutput | None:
        """Print the answer to a message as it comes.

        In a terminal, Ctrl-C cuts an answer short and keeps what came, and a message that cannot be
        answered is taken back with an error; returns None then.
        """
        asked = [*self._messages, {"role": "user", "content": message}]
        latest = _Latest()
        output = None
        try:
            prompt = self._llm.chat_prompt(asked)
            output = print_stream(latest.of(self._llm.stream(prompt, self._params)))
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except ValueError as error:
            if not interactive:
                raise
            print(f"moecore: {error}", file=sys.stderr)
            return None
        self._messages = [*asked, {"role": "assistant", "content": latest.text}]
        return output


class _Latest:
    """Remembers the text of outputs as they pass."""

    text = ""

    def of(self, outputs: Iterator[RequestOutput]) -> Iterator[RequestOutput]:
        for output in outputs:
            self.text = output.outputs[0].text
            yield output


def _messages(interactive: bool) -> Iterator[str]:
    """The user's messages: lines that are not empty, until the input ends."""
    if interactive:
        import readline  # noqa: F401  gives input() line editing and a history
    while True:
        if interactive:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        if line.strip():
            yield line.strip()
