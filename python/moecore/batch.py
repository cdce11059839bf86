"""What one forward pass takes, and who computes it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moecore.scheduler import Sequence


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of one forward pass. T tokens of S sequences, N of which want logits.

    The tensors are on the CPU; a ModelRunner moves what it needs. Position p of a sequence lies in
    slot p % block_size of block ``block_tables[s, p // block_size]``.
    """

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32, within the sequence
    query_offsets: Tensor  # [S + 1] int32: sequence s has the tokens query_offsets[s] ..
    #                        query_offsets[s + 1] - 1, at consecutive positions
    context_lens: Tensor  # [S] int32: tokens in the cache once this batch is written
    block_tables: Tensor  # [S, B] int32: cache blocks in order, padded with -1
    logit_rows: Tensor  # [N] int64: rows of T whose logits are wanted, ascending

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @classmethod
    def of(cls, scheduled: Seq[Sequence]) -> Batch:
        """Collect what a scheduler chose.

        Args:
            scheduled: at least one sequence, with num_scheduled_tokens >= 1 and blocks for them.
        """
        if all(s.num_scheduled_tokens == 1 == s.num_uncached_tokens for s in scheduled):
            return DecodeBatch(scheduled)
        starts = np.array([s.num_cached_tokens for s in scheduled], dtype=np.int32)
        lens = np.array([s.num_scheduled_tokens for s in scheduled], dtype=np.int32)
        ends = starts + lens
        query_offsets = np.zeros(len(lens) + 1, dtype=np.int32)
        np.cumsum(lens, out=query_offsets[1:])
        num_tokens = int(query_offsets[-1])

        token_ids = np.fromiter(
            chain.from_iterable(
                s.token_ids[start:end]
                for s, start, end in zip(scheduled, starts.tolist(), ends.tolist(), strict=True)
            ),
            dtype=np.int32,
            count=num_tokens,
        )
        shifts = np.repeat(starts - query_offsets[:-1], lens)
        positions = np.arange(num_tokens, dtype=np.int32) + shifts
        samples = np.array([s.needs_sample for s in scheduled], dtype=bool)
        logit_rows = query_offsets[1:][samples].astype(np.int64) - 1
        return cls(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(positions),
            query_offsets=torch.from_numpy(query_offsets),
            context_lens=torch.from_numpy(ends),
            block_tables=_block_tables(scheduled),
            logit_rows=torch.from_numpy(logit_rows),
        )


class DecodeBatch(Batch):
    """A Batch in which each sequence has its newest token only: most passes, and the shortest.

    Its numbers lie side by side in memory, of which the fields of Batch are made when somebody
    asks: after a pass nothing of torch is in a cache, and each of its operators takes 30 to 80 us.

    Args:
        scheduled: as `Batch.of` takes it, with one token each to compute.
    """

    def __init__(self, scheduled: Seq[Sequence]) -> None:
        positions = [s.num_cached_tokens for s in scheduled]
        numbers = array("i", [s.token_ids[-1] for s in scheduled])
        numbers.extend(positions)
        numbers.extend([position + 1 for position in positions])
        made = self.__dict__  # the dataclass is frozen
        made["num_sequences"] = len(positions)
        made["numbers"] = numbers.tobytes() + _table_bytes(scheduled)

    num_sequences: int
    numbers: bytes  # 3 S + S B int32: token_ids, positions, context_lens, block_tables

    @property
    def num_tokens(self) -> int:
        """T, which is S."""
        return self.num_sequences

    def __getattr__(self, name: str) -> Tensor:
        tensor = self._make(name)
        self.__dict__[name] = tensor  # found before __getattr__ from now on
        return tensor

    def _make(self, name: str) -> Tensor:
        size = self.num_sequences
        if name in ("query_offsets", "logit_rows"):
            return _one_row_each(size)[name == "logit_rows"]
        if name == "_numbers":
            return torch.frombuffer(bytearray(self.numbers), dtype=torch.int32)
        if name == "block_tables":
            return self._numbers[3 * size :].view(size, -1)
        try:
            begin = ("token_ids", "positions", "context_lens").index(name) * size
        except ValueError:
            raise AttributeError(name) from None
        return self._numbers[begin : begin + size]


@lru_cache(maxsize=64)
def _one_row_each(num_sequences: int) -> tuple[Tensor, Tensor]:
    """query_offsets and logit_rows of a pass of decodes, shared by the passes of that many."""
    return (
        torch.arange(num_sequences + 1, dtype=torch.int32),
        torch.arange(num_sequences, dtype=torch.int64),
    )


def _block_tables(scheduled: Seq[Sequence]) -> Tensor:
    rows = bytearray(_table_bytes(scheduled))
    return torch.frombuffer(rows, dtype=torch.int32).view(len(scheduled), -1)


def _table_bytes(scheduled: Seq[Sequence]) -> bytes:
    """The block tables, int32, padded with -1."""
    width = 4 * max([len(s.block_ids) for s in scheduled])
    return b"".join([s.block_ids.tobytes().ljust(width, b"\xff") for s in scheduled])


class ModelRunner(Protocol):
    """A model with its key-value cache.

    Logits of a sequence must not depend on the rest of the batch, nor on how its tokens were cut
    into passes: the engine's promises on outputs hold as far as the runner's do.
    """

    block_size: int  # tokens that a cache block holds
    num_blocks: int  # blocks of the cache
    vocab_size: int
    max_model_len: int  # tokens of the longest sequence, prompt and output

    def run(self, batch: Batch) -> Tensor:
        """Write the batch's keys and values into the cache, and compute logits.

        Returns:
            [N, V] float32, in the order of `batch.logit_rows`.
        """
        ...
