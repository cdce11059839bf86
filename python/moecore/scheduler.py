"""Which sequences the next forward pass computes, how many tokens of each, and in which blocks."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moecore.kv_cache import BlockPool, blocks_for


@dataclass(eq=False)
class Sequence:
    """Tokens to compute, and where those already computed lie in the cache.

    Until the sequence ends, its newest token is not in the cache: computing it is what gives the
    logits of the one after it. A waiting sequence has no blocks and nothing in the cache.
    """

    token_ids: list[int]  # the prompt, then what was generated
    num_cached_tokens: int = 0
    num_scheduled_tokens: int = 0  # the next ones of token_ids, in the pass that is being made
    # In order of positions; an array, since every pass copies it into a tensor.
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    num_preemptions: int = 0

    @property
    def num_uncached_tokens(self) -> int:
        """How many tokens are still to compute."""
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def needs_sample(self) -> bool:
        """Whether the scheduled tokens are all that were missing, so that the next can be drawn."""
        return self.num_scheduled_tokens == self.num_uncached_tokens


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """Continuous batching over a paged cache, first come, first served.

    A pass holds one token of every sequence that decodes and, in what max_num_batched_tokens then
    leaves, chunks of prompts, oldest first.

    Every running sequence is older than every waiting one: the oldest that waits is admitted first,
    and the youngest that runs is preempted first. The oldest can therefore take any block it needs,
    is part of every pass, and ends; then the next one is the oldest. No sequence starves.

    A sequence that needs a block when none is free takes those of the youngest, which goes back to
    the front of the queue, to be computed anew from its tokens. The youngest itself pauses instead
    and keeps its blocks: they are of use again as soon as an older one ends.

    Args:
        num_blocks: blocks of the cache, at least 1.
        block_size: tokens a block holds, at least 1.
        max_num_seqs: sequences that may run at a time, at least 1.
        max_num_batched_tokens: tokens of one pass, at least max_num_seqs.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        for name, value in (("block_size", block_size), ("max_num_seqs", max_num_seqs)):
            if value < 1:
                raise ValueError(f"Scheduler: {name} must be at least 1, got {value}")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                "Scheduler: max_num_batched_tokens must be at least max_num_seqs, so that every "
                f"sequence can decode in every pass, got {max_num_batched_tokens} with "
                f"max_num_seqs {max_num_seqs}"
            )
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pool = BlockPool(num_blocks)
        self.running: list[S] = []  # oldest first
        self.waiting: deque[S] = deque()  # oldest first

    @property
    def capacity(self) -> int:
        """How many tokens the whole cache holds."""
        return self.pool.num_blocks * self.block_size

    def add(self, sequence: S) -> None:
        """Queue a new sequence, of which at most `capacity` tokens are ever to be in the cache."""
        self.waiting.append(sequence)

    def schedule(self) -> list[S]:
        """Choose the next pass, and give its sequences the blocks that it writes.

        Returns:
            The sequences of the pass, oldest first, with num_scheduled_tokens >= 1 each; none only
            if none is unfinished.
        """
        scheduled: list[S] = []
        # One token of each decode is set aside before prompts share the rest.
        budget = self.max_num_batched_tokens
        budget -= sum(sequence.num_uncached_tokens == 1 for sequence in self.running)
        # Preemption shortens the list from its end while the loop is on its way there.
        for sequence in self.running:
            is_decode = sequence.num_uncached_tokens == 1
            if is_decode and sequence.num_cached_tokens < len(sequence.block_ids) * self.block_size:
                sequence.num_scheduled_tokens = 1  # most of all cases: its block has room
                scheduled.append(sequence)
                continue
            wanted = 1 if is_decode else min(sequence.num_uncached_tokens, budget)
            sequence.num_scheduled_tokens = self._reserve(sequence, wanted)
            if sequence.num_scheduled_tokens > 0:
                scheduled.append(sequence)
            if not is_decode:
                budget -= sequence.num_scheduled_tokens
        while self._can_admit(budget):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            wanted = min(sequence.num_uncached_tokens, budget)
            sequence.num_scheduled_tokens = self._reserve(sequence, wanted)
            scheduled.append(sequence)
            budget -= sequence.num_scheduled_tokens
        return scheduled

    def advance(self, scheduled: list[S]) -> None:
        """Note that a pass has written its tokens into the cache."""
        for sequence in scheduled:
            sequence.num_cached_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0

    def remove(self, sequence: S) -> None:
        """Forget a sequence that runs or waits, and free its blocks.

        Raises:
            ValueError: the sequence neither runs nor waits.
        """
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            raise ValueError("Scheduler.remove: sequence must run or wait, got one that does not")
        self._release(sequence)

    def clear(self) -> None:
        """Forget every sequence, and free all blocks."""
        for sequence in self.running:
            self._release(sequence)
        self.running.clear()
        self.waiting.clear()

    def _can_admit(self, budget: int) -> bool:
        """Whether the oldest waiting sequence may start.

        All of its tokens must fit, and one more block for each running sequence: else those would
        soon take back what was given, and its computation would be in vain.
        """
        if not self.waiting or budget <= 0 or len(self.running) >= self.max_num_seqs:
            return False
        needed = blocks_for(len(self.waiting[0].token_ids), self.block_size)
        return needed + len(self.running) <= self.pool.num_free

    def _reserve(self, sequence: S, num_tokens: int) -> int:
        """Give `sequence` blocks for its next `num_tokens` tokens, or as many as can be had.

        Returns:
            For how many of the tokens there is room: all, unless it is the youngest.
        """
        num_blocks = blocks_for(sequence.num_cached_tokens + num_tokens, self.block_size)
        missing = num_blocks - len(sequence.block_ids)
        while missing > self.pool.num_free and self.running[-1] is not sequence:
            self._preempt_youngest()
        sequence.block_ids.extend(self.pool.allocate(min(missing, self.pool.num_free)))
        room = len(sequence.block_ids) * self.block_size - sequence.num_cached_tokens
        return min(num_tokens, room)

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self._release(sequence)
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: S) -> None:
        self.pool.free(sequence.block_ids)
        del sequence.block_ids[:]
        sequence.num_cached_tokens = 0
        sequence.num_scheduled_tokens = 0
