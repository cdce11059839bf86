"""The command line: `moecore COMMAND`, or `python -m moecore COMMAND`.

Exit codes: 0 done, 1 failed (one message on stderr), 2 wrong usage, 130 interrupted. Each command
is a module with `add_parser(subparsers)` and `run(args) -> int`, which imports torch in `run` only.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from moecore.cli.options import UsageError

_COMMANDS = ("generate", "chat", "inspect", "doctor")
_INTERRUPTED = 130  # as a shell counts SIGINT
_BROKEN_PIPE = 141  # and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; `argv` is sys.argv[1:] unless given."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except UsageError as error:
        command: argparse.ArgumentParser = args.parser
        command.error(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has left. What is buffered goes nowhere, or the interpreter would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        if getattr(args, "verbose", False):
            raise
        print(f"moecore: {_message(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moecore", description="Run mixture-of-experts language models."
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"moecore.cli.{name}").add_parser(subparsers)
    return parser


class _Version(argparse.Action):
    """Asks the core for its version only when the option is given: the core brings torch."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        import moecore

        print(f"moecore {moecore.__version__}")
        parser.exit()


def _message(error: Exception) -> str:
    """What went wrong; errors that were not meant for users are named by their type."""
    meant = (ValueError, OSError, RuntimeError, MemoryError, ImportError)
    # KeyError and UnicodeError are among those only by descent.
    if isinstance(error, meant) and not isinstance(error, UnicodeError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (--verbose shows where)"
