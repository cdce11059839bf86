"""Decode passes as CUDA graphs: one launch where a model has hundreds of kernels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecore.attention import Attention
from moecore.batch import Batch
from moecore.models.decoder import CausalLM


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
    """

    def __init__(
        self,
        model: CausalLM,
        attention: Attention,
        cos_sin: Tensor,
        *,
        sizes: Sequence[int],
        max_blocks: int,
    ) -> None:
        self._sizes = list(sizes)
        vocab_size, device = model.config.vocab_size, cos_sin.device
        logits = torch.empty(self._sizes[-1], vocab_size, dtype=torch.float32, device=device)
        pool = torch.cuda.graph_pool_handle()
        # The largest first: later ones then find memory that it has left in the pool.
        self._graphs = {
            size: _DecodeGraph(model, attention, cos_sin, logits[:size], max_blocks, pool)
            for size in reversed(self._sizes)
        }

    def serves(self, batch: Batch) -> bool:
        """Whether there is a graph for this batch."""
        return is_decode(batch) and batch.context_lens.shape[0] <= self._sizes[-1]

    def run(self, batch: Batch) -> Tensor:
        """Return the logits [S, vocab_size] of a batch on the CPU, valid until the next run."""
        size = self._sizes[bisect_left(self._sizes, batch.context_lens.shape[0])]
        return self._graphs[size].run(batch)


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
            model.forward(batch, attention, cos_sin, activations=self._activations, out=logits)

        # Sequences of length 0: nothing is written to the cache. The first pass allocates.
        forward()
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
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
        self._inputs.copy_(self._host, non_blocking=True)
        self._copied.record()
        self._graph.replay()
        return self._logits[:count]
