"""`moecore doctor`: what this installation can do, and what to do about the rest."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecore.cli.check import Check

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="look at this installation, and say what could be better",
        description="Look at this installation, and say what could be better. Exits with 1 if"
        " something will not work.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from moecore.cli.checks import run_checks

    checks = run_checks()
    healthy = all(check.status != "problem" for check in checks)
    if args.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}))
    else:
        _show(checks)
    return 0 if healthy else 1


def _show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.status:>7}", style=_STYLES[check.status])
        line.append(f"  {check.name:<{width}}  {check.detail}", style="default")
        console.print(line)
        if check.advice is not None:
            console.print(Text(f"{'':{width + 11}}-> {check.advice}", style="dim"))
