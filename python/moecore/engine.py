"""The loop that turns requests into tokens: schedule, run, sample, update."""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Sequence

from torch import Tensor

from moecore.batch import Batch, ModelRunner
from moecore.outputs import RequestOutput
from moecore.request import Completion, Request, derive_seed
from moecore.sampling import SampledToken, sample
from moecore.sampling_params import SamplingParams
from moecore.scheduler import Scheduler
from moecore.tokenizer import Tokenizer


class Engine:
    """Computes requests together, each with the tokens it would get alone.

    Requests may come and go between steps. They are served first come, first served; when the cache
    runs short, the youngest wait, and are computed anew later. Not for several threads at a time.

    Args:
        runner: the model with its cache.
        tokenizer: turns token ids into text; without one, text is "".
        eos_token_ids: tokens that end a completion, unless its request ignores them.
        max_num_seqs: sequences computed at a time, at least 1; a request has `params.n` of them.
        max_num_batched_tokens: tokens of one pass, at least max_num_seqs. Longer prompts are cut
            into chunks.
        seed: with a request's place in the order of arrival, gives the seed of a request that has
            none.

    Attributes:
        scheduler: what runs, what waits, and the free blocks; to look at.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> engine = Engine(runner, tokenizer, eos_token_ids=[tokenizer.eos_token_id])
        >>> engine.add_request("a", tokenizer.encode("Once upon"), SamplingParams(max_tokens=8))
        >>> while engine.has_unfinished:
        ...     for output in engine.step():
        ...         print(output.outputs[0].text)
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: Collection[int] = (),
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        seed: int = 0,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self.scheduler: Scheduler[Completion] = Scheduler(
            runner.num_blocks,
            runner.block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._unfinished: dict[str, Request] = {}  # in order of arrival
        self._num_requests = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._unfinished)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether this request waits or runs."""
        return request_id in self._unfinished

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        stream: bool = True,
        number: int | None = None,
    ) -> None:
        """Queue a request; the next steps compute it.

        Args:
            request_id: its name, which no unfinished request has.
            prompt_token_ids: at least one id in [0, vocab_size), and fewer than max_model_len.
            params: how to draw tokens, and when to stop.
            prompt: the text of the prompt, for the outputs.
            stream: report the request at every step that adds to it, and not only when it ends.
            number: its place in the order of arrival (default: counted here).

        Raises:
            ValueError: an argument is out of range, or the request is longer than the whole cache;
                the message names the rule and the value. Nothing is queued.
        """
        self.queue(
            self.make_request(
                request_id, prompt_token_ids, params, prompt, stream=stream, number=number
            )
        )

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        stream: bool = True,
        number: int | None = None,
    ) -> Request:
        """Check a request as `add_request` does, and return it for `queue`."""
        if request_id in self._unfinished:
            raise ValueError(
                "Engine.add_request: request_id must not be that of an unfinished request, "
                f"got {request_id!r}"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError(
                f"Engine.add_request: stop must be empty without a tokenizer, got {params.stop!r}"
            )
        token_ids = self._check_prompt(prompt_token_ids)
        return Request.create(
            request_id,
            token_ids,
            params,
            prompt=prompt,
            stream=stream,
            arrival_time=time.monotonic(),
            tokenizer=self._tokenizer,
            eos_token_ids=self._eos_token_ids,
            vocab_size=self._runner.vocab_size,
            max_len=self._max_len(len(token_ids), params),
            default_seed=derive_seed(self._seed, self._num_requests if number is None else number),
        )

    def queue(self, request: Request) -> None:
        """Queue what `make_request` returned."""
        self._num_requests += 1
        self._unfinished[request.request_id] = request
        for completion in request.completions:
            self.scheduler.add(completion)

    def step(self) -> list[RequestOutput]:
        """Compute one pass over the requests at hand.

        If it fails, every unfinished request is aborted, and the engine is ready for new ones.

        Returns:
            What the pass added to or finished, in order of arrival; each output is a snapshot with
            everything so far. None while prompts are being computed, or if no request is at hand.

        Raises:
            Exception: whatever the runner raised, or sampling from its logits did.
        """
        if not self._unfinished:
            return []
        try:
            scheduled = self.scheduler.schedule()
            logits = self._runner.run(Batch.of(scheduled))
            # What needs no token is done while a GPU still computes them.
            to_sample = [c for c in scheduled if c.needs_sample]
            self.scheduler.advance(scheduled)
            return self._update(self._sample(logits, to_sample))
        except BaseException:
            self.scheduler.clear()
            self._unfinished.clear()
            raise

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request at once, and free its blocks.

        Returns:
            What it has so far; unfinished completions have the finish_reason "abort". None if no
            unfinished request has this id: it may just have finished.
        """
        request = self._unfinished.get(request_id)
        if request is None:
            return None
        for completion in request.completions:
            if completion.finish_reason is None:
                self.scheduler.remove(completion)
                completion.finish("abort")
        return self._retire(request, time.monotonic())

    def _sample(
        self, logits: Tensor, completions: list[Completion]
    ) -> list[tuple[Completion, SampledToken]]:
        tokens = sample(logits, [completion.sampler for completion in completions])
        return list(zip(completions, tokens, strict=True))

    def _update(self, sampled: list[tuple[Completion, SampledToken]]) -> list[RequestOutput]:
        now = time.monotonic()
        touched: dict[str, Request] = {}
        for completion, token in sampled:
            request = self._unfinished[completion.request_id]
            if request.first_token_time is None:
                request.first_token_time = now
            completion.append(token)
            if completion.finish_reason is not None:
                self.scheduler.remove(completion)
            touched[request.request_id] = request
        outputs = []
        for request in touched.values():
            if request.is_finished:
                outputs.append(self._retire(request, now))
            elif request.stream:
                outputs.append(request.output())
        return outputs

    def _retire(self, request: Request, now: float) -> RequestOutput:
        request.finished_time = now
        del self._unfinished[request.request_id]
        return request.output()

    def _check_prompt(self, prompt_token_ids: Sequence[int]) -> list[int]:
        vocab_size = self._runner.vocab_size
        max_model_len = self._runner.max_model_len
        if not 0 < len(prompt_token_ids) < max_model_len:
            raise ValueError(
                "Engine.add_request: prompt_token_ids must have a length in [1, max_model_len), "
                f"got {len(prompt_token_ids)} with max_model_len {max_model_len}"
            )
        token_ids: list[int] = []
        for position, given in enumerate(prompt_token_ids):
            try:
                token_id = operator.index(given)
            except TypeError:
                token_id = -1
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"Engine.add_request: prompt_token_ids must be integers in [0, {vocab_size}), "
                    f"got {given!r} at position {position}"
                )
            token_ids.append(token_id)
        return token_ids

    def _max_len(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Return at how many tokens a completion ends, or raise if the cache never holds that."""
        max_len = self._runner.max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, num_prompt_tokens + params.max_tokens)
        num_cached = max_len - 1  # the last token ends the completion without being computed
        if num_cached > self.scheduler.capacity:
            raise ValueError(
                "Engine.add_request: prompt and output must fit into the cache, "
                f"got {num_prompt_tokens} prompt tokens and up to {max_len - num_prompt_tokens} "
                f"new ones for a cache of {self.scheduler.capacity} tokens: shorten the prompt, "
                "lower max_tokens or max_model_len, or give the cache more memory"
            )
        return max_len
