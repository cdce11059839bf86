"""What generation returns. Names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """A token's place in the model's own distribution."""

    logprob: float  # natural logarithm of its probability
    rank: int  # 1 for the likeliest
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt, as far as it has come."""

    index: int  # 0 .. n - 1 within the request
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # sum over token_ids, if logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # one dict a token: token id -> Logprob
    finish_reason: str | None = None  # "stop", "length", "abort", or None while it runs
    stop_reason: int | str | None = None  # stop string or token id; None for end of sequence

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When things happened, in seconds of time.monotonic()."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0  # times its cache was given up and computed again


@dataclass(frozen=True)
class RequestOutput:
    """A request with its completions, as far as they have come."""

    request_id: str
    prompt: str | None  # None where the prompt came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
