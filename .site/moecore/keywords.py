"""Unknown keywords: an error that names the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise if a given keyword is not a known one.

    Args:
        where: what takes the keywords, the first word of the message.
        given: the keywords that a caller wrote.
        known: the keywords that exist.

    Raises:
        TypeError: a keyword is unknown; the message names it and the nearest known one, or all
            known ones where none is near.

    Example:
        >>> reject_unknown("SamplingParams", ["temprature"], ["temperature", "top_p"])
        Traceback (most recent call last):
        TypeError: SamplingParams: unknown argument 'temprature'; did you mean 'temperature'?
    """
    known = list(known)
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known arguments: {', '.join(known)}"
        raise TypeError(f"{where}: unknown argument {name!r}; {hint}")
