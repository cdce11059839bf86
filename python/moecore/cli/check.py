"""A finding of `moecore doctor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """One finding. "problem": something will not work; "note": it works, and could be better."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    advice: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
