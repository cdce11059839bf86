"""Decode passes as CUDA graphs: one launch where a model has hundreds of kernels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from moecore.attention import Attention
from moecore.batch import Batch
from moecore.models.decoder import CausalLM
from moecore.transport import Transport


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that get a graph: passes in between are filled up to the next one."""
    small = [size for size in (1, 2, 4) if size < max_num_seqs]
    return [*small, *range(8, max_num_seqs, 8), max_num_seqs]


def is_decode(batch: Batch) -> bool:
    """Whether every sequence of the batch has one token, whose logits are wanted."""
    num_sequences = batch.context_lens.shape[0]
    return batch.num_tokens == num_sequences == batch.logit_rows.shape[0]


class DecodeGraphs:
    """Graphs of a model's passes of one token a sequence, captured when they are made.

    Args:
        model: its weights loaded, on a CUDA device.
        attention: whose kernels run in graphs: their grids depend on sizes only.
        cos_sin: as CausalLM.forward takes it.
        sizes: numbers of sequences, ascending.
        max_blocks: of a sequence.
        transport: of an expert-parallel rank: all ranks make and run the same graphs together.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: Attention,
        cos_sin: Tensor,
        *,
        sizes: Sequence[int],
        max_blocks: int,
        transport: Transport | None = None,
    ) -> None:
        self._sizes = list(sizes)
        vocab_size, device = model.config.vocab_size, cos_sin.device
        logits = torch.empty(self._sizes[-1], vocab_size, dtype=torch.float32, device=device)
        pool = torch.cuda.graph_pool_handle()
        # The largest first: later ones then find memory that it has left in the pool.
        self._graphs = {
            size: _DecodeGraph(
                model, attention, cos_sin, logits[:size], max_blocks, pool, transport
            )
            for size in reversed(self._sizes)
        }

    def serves(self, batch: Batch) -> bool:
        """Whether there is a graph for this batch."""
        return is_decode(batch) and batch.context_lens.shape[0] <= self._sizes[-1]

    def run(self, batch: Batch, most: int = 0) -> Tensor:
        """Return the logits [S, vocab_size] of a batch on the CPU, valid until the next run.

        Args:
            batch: of S sequences, for which there is a graph.
            most: sequences of any rank, if there are several ranks.
        """
        return self._graph_of(max(most, batch.context_lens.shape[0])).run(batch)

    def join(self, most: int) -> None:
        """Take part in a pass of the other ranks, which have up to `most` sequences."""
        self._graph_of(most).join()

    def _graph_of(self, num_sequences: int) -> _DecodeGraph:
        return self._graphs[self._sizes[bisect_left(self._sizes, num_sequences)]]


class _DecodeGraph:
    """The graph of `size` sequences, and the memory that it reads and writes."""

    def __init__(
        self,
        model: CausalLM,
        attention: Attention,
        cos_sin: Tensor,
        logits: Tensor,
        max_blocks: int,
        pool: Any,
        transport: Transport | None,
    ) -> None:
        size, device = len(logits), logits.device
        self._logits = logits
        # All inputs in one piece of memory, so that a step copies once.
        lengths = [size, size, size, size * max_blocks]
        self._host = torch.zeros(sum(lengths), dtype=torch.int32, pin_memory=True)
        self._inputs = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.split(self._host, lengths)
        self._token_ids, self._positions, self._context_lens = (part.numpy() for part in host[:3])
        self._block_tables = host[3].view(size, max_blocks).numpy()
        token_ids, positions, context_lens, block_tables = torch.split(self._inputs, lengths)
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            query_offsets=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=context_lens,
            block_tables=block_tables.view(size, max_blocks),
            logit_rows=torch.arange(size, device=device),
        )
        self._batch, self._activations = batch, model.activations(size)

        def forward() -> None:
            with nullcontext() if transport is None else transport.fixed_tokens(size):
                model.forward(batch, attention, cos_sin, activations=self._activations, out=logits)

        # Sequences of length 0: nothing is written to the cache. The first pass allocates.
        forward()
        if transport is not None:  # this wait has a deadline
            transport.synchronize("first pass of a graph")
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        # Ranks may be threads, and transports have some of their own.
        mode = "global" if transport is None else "thread_local"
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode=mode):
            forward()

    def run(self, batch: Batch) -> Tensor:
        count = batch.context_lens.shape[0]
        width = batch.block_tables.shape[1]
        self._copied.synchronize()  # the last step's copy has left the host's memory
        for target, source in (
            (self._token_ids, batch.token_ids),
            (self._positions, batch.positions),
            (self._context_lens, batch.context_lens),
        ):
            target[:count] = source.numpy()
            target[count:] = target[0]
        # What fills the batch up is the first sequence again: it meets the same experts, so no
        # weights are read for it, and writes the same keys and values to the same place.
        self._block_tables[:count, :width] = batch.block_tables.numpy()
        self._block_tables[count:] = self._block_tables[0]
        self._replay()
        return self._logits[:count]

    def join(self) -> None:
        """Run with sequences of length 0 only."""
        self._copied.synchronize()
        self._host.zero_()
        self._replay()

    def _replay(self) -> None:
        self._inputs.copy_(self._host, non_blocking=True)
        self._copied.record()
        self._graph.replay()
