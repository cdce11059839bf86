"""Ctrl-C at a moment that suits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Let the body end before Ctrl-C is heeded; a second Ctrl-C does not wait.

    Where no handler of Python's is set, or on another thread than the main one, this does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pending: list[FrameType | None] = []

    def handler(number: int, frame: FrameType | None) -> None:
        pending.append(frame)
        if len(pending) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        before(signal.SIGINT, pending[0])
