"""What LLM was asked for about its ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupOptions:
    """LLM's arguments `expert_parallel_*`, documented there.

    Raises:
        ValueError: one is out of range.
    """

    size: int
    backend: str
    timeout: float

    def __post_init__(self) -> None:
        size: object = self.size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"LLM: expert_parallel_size must be an integer >= 1, got {size!r}")
        if self.backend not in ("processes", "threads"):
            raise ValueError(
                "LLM: expert_parallel_backend must be 'processes' or 'threads', "
                f"got {self.backend!r}"
            )
        timeout: object = self.timeout
        if not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise ValueError(
                f"LLM: expert_parallel_timeout must be a number of seconds > 0, got {timeout!r}"
            )
