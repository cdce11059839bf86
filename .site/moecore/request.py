"""A request, its completions, and when they end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from moecore.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from moecore.sampling import RequestSampler, SampledToken
from moecore.sampling_params import SamplingParams
from moecore.scheduler import Sequence
from moecore.tokenizer import TextStream, Tokenizer


def derive_seed(*parts: int) -> int:
    """Return a seed in [0, 2**63) that depends on every part and its place."""
    digest = blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(eq=False, kw_only=True)
class Completion(Sequence):
    """One of a request's sequences, with what its tokens have become."""

    request_id: str
    index: int
    num_prompt_tokens: int
    max_len: int  # tokens at which it ends, prompt included
    eos_token_ids: Collection[int]  # empty if the request ignores them
    stop_token_ids: Collection[int]
    sampler: RequestSampler
    tokenizer: Tokenizer | None
    text_stream: TextStream | None  # None without a tokenizer
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def append(self, sampled: SampledToken) -> None:
        """Add the token just drawn, and end if it is the last one.

        A token that stops the completion is among its token ids, but not in its text. A stop string
        counts before the length, where one token brings both.
        """
        token_id = sampled.token_id
        self.token_ids.append(token_id)
        self.sampler.accept(token_id)
        self._append_logprobs(sampled)
        if token_id in self.eos_token_ids:
            self.finish("stop")
        elif token_id in self.stop_token_ids:
            self.finish("stop", token_id)
        elif self._push(token_id):
            self.finish("stop")
        elif len(self.token_ids) >= self.max_len:
            self.finish("length")

    def finish(self, finish_reason: str, stop_reason: int | str | None = None) -> None:
        """End, and release the text that was held back as the possible start of a stop string."""
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        if self.text_stream is not None:
            self.text_stream.finish()
            if self.text_stream.stop_reason is not None and finish_reason != "abort":
                self.finish_reason = "stop"
                self.stop_reason = self.text_stream.stop_reason

    def output(self) -> CompletionOutput:
        """Return a snapshot, which later tokens do not change."""
        return CompletionOutput(
            index=self.index,
            text="" if self.text_stream is None else self.text_stream.text,
            token_ids=self.token_ids[self.num_prompt_tokens :],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _push(self, token_id: int) -> bool:
        """Add a token to the text; returns whether a stop string is complete."""
        if self.text_stream is None:
            return False
        self.text_stream.push(token_id)
        return self.text_stream.stop_reason is not None

    def _append_logprobs(self, sampled: SampledToken) -> None:
        if self.logprobs is None or self.cumulative_logprob is None:
            return
        assert sampled.logprob is not None
        assert sampled.top_logprobs is not None
        self.cumulative_logprob += sampled.logprob
        self.logprobs.append(
            {
                token_id: replace(entry, decoded_token=self._decode(token_id))
                for token_id, entry in sampled.top_logprobs.items()
            }
        )

    def _decode(self, token_id: int) -> str | None:
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode([token_id], skip_special_tokens=False)


@dataclass(eq=False, kw_only=True)
class Request:
    """What was asked, and the completions that answer it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    stream: bool  # whether every step is reported, and not only the last
    arrival_time: float
    completions: list[Completion] = field(default_factory=list)
    first_token_time: float | None = None
    finished_time: float | None = None

    @classmethod
    def create(
        cls,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None,
        stream: bool,
        arrival_time: float,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
        vocab_size: int,
        max_len: int,
        default_seed: int,
    ) -> Request:
        """Make a request with its `params.n` completions.

        Completion 0 draws with the request's seed, so that it is the one that n = 1 gives; the
        others draw with seeds derived from it.
        """
        request = cls(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            stream=stream,
            arrival_time=arrival_time,
        )
        seed = default_seed if params.seed is None else params.seed
        wants_logprobs = params.logprobs is not None
        for index in range(params.n):
            text_stream = None
            if tokenizer is not None:
                text_stream = TextStream(tokenizer, params.stop, prompt_token_ids)
            sampler = RequestSampler(
                params,
                prompt_token_ids=prompt_token_ids,
                seed=seed if index == 0 else derive_seed(seed, index),
                eos_token_ids=eos_token_ids,
                vocab_size=vocab_size,
                request_id=request_id,
            )
            completion = Completion(
                token_ids=list(prompt_token_ids),
                request_id=request_id,
                index=index,
                num_prompt_tokens=len(prompt_token_ids),
                max_len=max_len,
                eos_token_ids=() if params.ignore_eos else eos_token_ids,
                stop_token_ids=frozenset(params.stop_token_ids),
                sampler=sampler,
                tokenizer=tokenizer,
                text_stream=text_stream,
                cumulative_logprob=0.0 if wants_logprobs else None,
                logprobs=[] if wants_logprobs else None,
            )
            request.completions.append(completion)
        return request

    @property
    def is_finished(self) -> bool:
        """Whether every completion has ended."""
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """Return a snapshot, which later steps do not change."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output() for completion in self.completions],
            finished=self.is_finished,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                first_token_time=self.first_token_time,
                finished_time=self.finished_time,
                num_preemptions=sum(c.num_preemptions for c in self.completions),
            ),
        )
