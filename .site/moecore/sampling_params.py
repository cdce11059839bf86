"""SamplingParams: how the tokens of a request are chosen, and when it ends."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from moecore.keywords import reject_unknown

# Below this a temperature counts as 0: logits divided by it would leave float32.
_SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True, init=False)
class SamplingParams:
    """How to choose the tokens of a request, and when to stop. Immutable, checked when made.

    A token is drawn from the logits in this order: `repetition_penalty`, `min_tokens`,
    `temperature`, `min_p`, `top_k`, `top_p`. Names and defaults are vLLM's.

    Args:
        n: completions of each prompt, >= 1.
        temperature: >= 0; 0 (or less than 1e-5) takes the likeliest token, always.
        top_p: in (0, 1]: the fewest likeliest tokens whose probabilities reach this sum.
        top_k: the k likeliest tokens, >= 1; 0 or -1: all.
        min_p: in [0, 1]: tokens at least this likely, relative to the likeliest.
        repetition_penalty: > 0; logits of tokens in the prompt or the completion are divided by it
            if positive and multiplied by it if negative.
        seed: integer in [0, 2**64); the same seed gives the same tokens, whatever else runs.
            None: derived from the engine's seed and the request's order.
        stop: a string, or several: the text ends before the first that appears.
        stop_token_ids: tokens that end a completion, beside the model's own.
        ignore_eos: go on past the model's end-of-sequence tokens.
        max_tokens: most tokens of a completion, >= 1; None: as many as the model's context holds.
        min_tokens: no end-of-sequence or stop token before this many, in [0, max_tokens].
        logprobs: this many of the likeliest tokens at each step with their log-probabilities under
            the model's own logits, >= 0; the chosen token is always among them. None: no such data.

    Raises:
        ValueError: a value does not hold; the message names the argument, the rule and the value.
        TypeError: an unknown argument; the message names the nearest known one.

    Example:
        >>> SamplingParams(temperature=0.7, top_p=0.9, stop="\\n\\n").stop
        ('\\n\\n',)
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    max_tokens: int | None
    min_tokens: int
    logprobs: int | None

    # __init__ below shows its arguments to readers and type checkers; __new__ sees unknown ones.
    def __new__(cls, *args: Any, **given: Any) -> SamplingParams:
        reject_unknown(cls.__name__, given, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __init__(
        self,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        logprobs: int | None = None,
    ) -> None:
        checked = {
            "n": _integer("n", n, 1),
            "temperature": _real("temperature", temperature, ">= 0", lambda x: x >= 0),
            "top_p": _real("top_p", top_p, "in (0, 1]", lambda x: 0 < x <= 1),
            "top_k": _integer("top_k", top_k, -1),
            "min_p": _real("min_p", min_p, "in [0, 1]", lambda x: 0 <= x <= 1),
            "repetition_penalty": _real(
                "repetition_penalty", repetition_penalty, "> 0", lambda x: x > 0
            ),
            "seed": None if seed is None else _integer("seed", seed, 0, 2**64 - 1),
            "stop": _stop_strings(stop),
            "stop_token_ids": _token_ids(stop_token_ids),
            "ignore_eos": bool(ignore_eos),
            "max_tokens": None if max_tokens is None else _integer("max_tokens", max_tokens, 1),
            "min_tokens": _integer("min_tokens", min_tokens, 0, max_tokens),
            "logprobs": None if logprobs is None else _integer("logprobs", logprobs, 0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that no noise is drawn."""
        return self.temperature < _SMALLEST_TEMPERATURE


def _fail(name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"SamplingParams: {name} must be {rule}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    rule = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    try:
        # A bool is an int to Python; n=True is a mistake all the same.
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise _fail(name, rule, value)
    return number


def _real(name: str, value: object, rule: str, holds: Any) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not holds(value):  # type: ignore[arg-type]
        raise _fail(name, f"a number {rule}", value)
    return float(value)  # type: ignore[arg-type]


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _elements("stop", "strings", stop)
    if not all(isinstance(string, str) and string for string in strings):
        raise _fail("stop", "a string or a list of strings, none empty", stop)
    return tuple(str(string) for string in strings)


def _token_ids(stop_token_ids: object) -> tuple[int, ...]:
    elements = _elements("stop_token_ids", "token ids", stop_token_ids)
    return tuple(_integer("each of stop_token_ids", token_id, 0) for token_id in elements)


def _elements(name: str, what: str, value: object) -> tuple[object, ...]:
    if value is None:
        return ()
    try:
        return tuple(value)  # type: ignore[arg-type]
    except TypeError:
        raise _fail(name, f"a list of {what}", value) from None
