"""Requests, outputs and errors as the JSON values that travel between ranks."""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moecore._core import TransportError, UnsupportedError
from moecore.errors import FormatError
from moecore.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from moecore.sampling_params import SamplingParams

Values = dict[str, Any]


def encode_params(params: SamplingParams) -> Values:
    return asdict(params)


def decode_params(values: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(**values)


def encode_output(output: RequestOutput) -> Values:
    """The output without its prompt, which rank 0 has."""
    values = asdict(output)
    del values["prompt"], values["prompt_token_ids"]
    return values


def decode_output(
    values: Mapping[str, Any], prompt: str | None, prompt_token_ids: list[int], arrival_time: float
) -> RequestOutput:
    """The output again; its times count from `arrival_time` on this rank's clock."""
    metrics = RequestMetrics(**values["metrics"])
    shift = arrival_time - metrics.arrival_time
    metrics.arrival_time = arrival_time
    if metrics.first_token_time is not None:
        metrics.first_token_time += shift
    if metrics.finished_time is not None:
        metrics.finished_time += shift
    return RequestOutput(
        request_id=values["request_id"],
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[_completion(completion) for completion in values["outputs"]],
        finished=values["finished"],
        metrics=metrics,
    )


def _completion(values: Mapping[str, Any]) -> CompletionOutput:
    logprobs = values["logprobs"]
    if logprobs is not None:  # JSON has made strings of the token ids
        logprobs = [
            {int(token_id): Logprob(**entry) for token_id, entry in table.items()}
            for table in logprobs
        ]
    return CompletionOutput(**{**values, "logprobs": logprobs})


def encode_error(error: BaseException) -> Values:
    return {
        "class": type(error).__name__,
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
        "fault": (error.rank, error.phase) if isinstance(error, TransportError) else None,
    }


def decode_error(values: Mapping[str, Any], rank: int, phase: str) -> Exception:
    """The error that another rank raised: of its own type where a user may expect that type.

    The trace on that rank is the `__cause__`'s text.
    """
    name, message = values["class"], values["message"]
    kind = _EXPECTED.get(name, RuntimeError)
    what = message if kind is not RuntimeError or name == "RuntimeError" else f"{name}: {message}"
    error = kind(f"{what}\n(raised on rank {rank} of an expert-parallel group, {phase})")
    if isinstance(error, TransportError):
        error.rank, error.phase = values["fault"]
    error.__cause__ = RemoteTrace(f"on rank {rank}:\n{values['trace']}")
    return error


class RemoteTrace(Exception):
    """Where another rank raised, as text."""


_EXPECTED: dict[str, type[Exception]] = {
    "FormatError": FormatError,
    "UnsupportedError": UnsupportedError,
    "TransportError": TransportError,
    **{
        name: getattr(builtins, name)
        for name in ("ValueError", "TypeError", "MemoryError", "FileNotFoundError", "OSError")
    },
}
