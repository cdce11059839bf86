"""From logits to tokens: penalties, masks, temperature, min_p, top_k, top_p, one draw a row.

N rows (sequences), V vocab_size. A row's token depends on that row, its parameters, its seed and
how many tokens it has drawn, never on other rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moecore.draw import argmax, draw, take_rows, top_ids
from moecore.outputs import Logprob
from moecore.sampling_params import SamplingParams

_NOISE_AT_ONCE = 32  # the stream is the same, however many numbers are made at a time


class SampledToken(NamedTuple):
    """What a row drew."""

    token_id: int
    logprob: float | None = None  # of this token; None unless the request asks for logprobs
    top_logprobs: dict[int, Logprob] | None = None  # this token, then the likeliest ones


class RequestSampler:
    """How one sequence draws its tokens: its parameters, its noise, and the tokens it has seen.

    Args:
        params: SamplingParams of the request.
        prompt_token_ids: of the prompt; `repetition_penalty` counts them as seen.
        seed: integer in [0, 2**64); one a sequence, also where a request has several.
        eos_token_ids: the model's; `min_tokens` bars them. Ids beyond the vocabulary are dropped.
        vocab_size: V.
        request_id: named in errors.

    Raises:
        ValueError: a prompt token or a token of `stop_token_ids` is outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int],
        seed: int,
        eos_token_ids: Collection[int],
        vocab_size: int,
        request_id: str | None = None,
    ) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self.request_id = request_id
        self.num_tokens = 0  # accepted so far
        _check_ids("prompt_token_ids", prompt_token_ids, vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
        ends = {*params.stop_token_ids, *(t for t in eos_token_ids if 0 <= t < vocab_size)}
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64)
        # One stream on every device: the noise is made on the CPU.
        self._generator = torch.Generator().manual_seed(seed)
        self._noise: list[float] = []  # made but not drawn, the next one last
        self._is_plain = params.greedy and params.logprobs is None
        self._min_tokens = params.min_tokens if ends else 0
        self._seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(list(prompt_token_ids), dtype=torch.int64)] = True

    def accept(self, token_id: int) -> None:
        """Note that the sequence goes on with this token."""
        self.num_tokens += 1
        if self._seen is not None:
            self._seen[token_id] = True

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is that of the largest raw logit, and nothing else is asked."""
        return self._is_plain and self._seen is None and self.num_tokens >= self._min_tokens

    @property
    def edits_logits(self) -> bool:
        """Whether `edit_logits` changes anything at the next token."""
        return self._seen is not None or self._bars_ends

    @property
    def _bars_ends(self) -> bool:
        return self.num_tokens < self._min_tokens

    def edit_logits(self, row: Tensor) -> None:
        """Apply `repetition_penalty` and `min_tokens` to logits [V], in place."""
        if self._seen is not None:
            self._seen = self._seen.to(row.device)
            penalty = self.params.repetition_penalty
            penalised = torch.where(row > 0, row / penalty, row * penalty)
            torch.where(self._seen, penalised, row, out=row)
        if self._bars_ends:
            self._ends = self._ends.to(row.device)
            row[self._ends] = -torch.inf

    def draw_uniform(self) -> float:
        """The next number of the sequence's noise, in [0, 1)."""
        if not self._noise:  # several at once: an operator of torch takes some 60 us in a decode
            made = torch.rand(_NOISE_AT_ONCE, dtype=torch.float64, generator=self._generator)
            self._noise = made.tolist()[::-1]
        return self._noise.pop()


def sample(logits: Tensor, samplers: list[RequestSampler]) -> list[SampledToken]:
    """Draw the next token of every row.

    Equal logits rank in the order of their ids. Log-probabilities are those of the raw logits.

    Args:
        logits: [N, V] float32, finite or -inf, with at least one finite in a row; left as it is.
        samplers: of the N rows.

    Returns:
        N tokens. `RequestSampler.accept` is the caller's to call.

    Raises:
        ValueError: the shape or dtype does not hold, or a row has a NaN, a +inf or nothing finite
            (the message names its request). No sampler has drawn noise then.

    Example:
        >>> greedy = SamplingParams(temperature=0)
        >>> row = RequestSampler(
        ...     greedy, prompt_token_ids=[], seed=0, eos_token_ids=[], vocab_size=3
        ... )
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), [row])[0].token_id
        1
    """
    _check_logits(logits, samplers)
    # Before the first look at the logits, for which a GPU must have ended its pass.
    others = [i for i, sampler in enumerate(samplers) if not sampler.is_plain_greedy]
    token_ids = _argmax(logits, samplers)
    if not others:
        return [SampledToken(token_id) for token_id in token_ids]

    edited = take_rows(logits, others)
    if any(samplers[i].edits_logits for i in others):
        rows = [samplers[i] for i in others]
        edited = _edited(edited, rows)
        for i, likeliest in zip(others, _argmax(edited, rows), strict=True):
            token_ids[i] = likeliest
    random = [row for row, i in enumerate(others) if not samplers[i].params.greedy]
    if random:
        rows = [samplers[others[row]] for row in random]
        noise = [sampler.draw_uniform() for sampler in rows]
        drawn = draw(take_rows(edited, random), [sampler.params for sampler in rows], noise)
        for row, token_id in zip(random, drawn, strict=True):
            token_ids[others[row]] = token_id
    return _with_logprobs(logits, samplers, token_ids)


def _edited(logits: Tensor, samplers: list[RequestSampler]) -> Tensor:
    """A copy of the rows after penalties and masks."""
    edited = logits.clone()
    for row, sampler in zip(edited, samplers, strict=True):
        sampler.edit_logits(row)
    return edited


def _with_logprobs(
    logits: Tensor, samplers: list[RequestSampler], token_ids: list[int]
) -> list[SampledToken]:
    sampled = [SampledToken(token_id) for token_id in token_ids]
    rows = [i for i, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    if not rows:
        return sampled
    raw = take_rows(logits, rows)
    logprobs = raw.log_softmax(dim=-1)
    chosen = torch.tensor([token_ids[i] for i in rows]).to(logits.device)[:, None]
    chosen_logprobs = logprobs.gather(1, chosen)[:, 0].tolist()
    ids = torch.arange(logits.shape[1], device=logits.device)
    chosen_logits = raw.gather(1, chosen)
    ahead = (raw > chosen_logits) | ((raw == chosen_logits) & (ids < chosen))
    ranks = (ahead.sum(dim=-1) + 1).tolist()
    width = max(min(samplers[i].params.logprobs or 0, logits.shape[1]) for i in rows)
    ids_by_rank = top_ids(raw, width)
    top = zip(ids_by_rank.tolist(), logprobs.gather(1, ids_by_rank).tolist(), strict=True)
    for row, (i, (ranked, values)) in enumerate(zip(rows, top, strict=True)):
        table = {token_ids[i]: Logprob(chosen_logprobs[row], ranks[row])}
        for rank, token_id in enumerate(ranked[: samplers[i].params.logprobs], start=1):
            table.setdefault(token_id, Logprob(values[rank - 1], rank))
        sampled[i] = SampledToken(token_ids[i], chosen_logprobs[row], table)
    return sampled


def _argmax(logits: Tensor, samplers: list[RequestSampler]) -> list[int]:
    """The first of each row's largest logits. Raises where that is no finite number."""
    token_ids, largest = argmax(logits)
    if not all(map(math.isfinite, largest)):
        row = list(map(math.isfinite, largest)).index(False)
        name = samplers[row].request_id
        where = f"row {row}" if name is None else f"request {name!r}"
        rule = "finite or -inf, and one of them finite"
        got = f"a maximum of {largest[row]}"
        raise ValueError(f"sample: logits of {where} must be {rule}, got {got}")
    return token_ids


def _check_logits(logits: Tensor, samplers: list[RequestSampler]) -> None:
    shape = logits.shape
    if len(shape) != 2 or shape[0] != len(samplers) or logits.dtype != torch.float32:
        got = f"{logits.dtype} {list(shape)}"
        raise ValueError(f"sample: logits must be float32 [{len(samplers)}, V], got {got}")
    vocab_size = shape[1]
    for sampler in samplers:
        if sampler.vocab_size != vocab_size:
            raise ValueError(
                f"sample: logits must have {sampler.vocab_size} columns, got {vocab_size}"
            )


def _check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            rule = f"in [0, {vocab_size})"
            raise ValueError(f"RequestSampler: {name} must be {rule}, got {token_id}")
