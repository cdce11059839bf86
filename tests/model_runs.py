"""Runs of a loaded model without the engine: chosen chunks, chosen batches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moecore.batch import Batch
from moecore.config import read_config
from moecore.model_runner import CachePlan, ModelRunner
from moecore.models.load import load_model


class Runner:
    """A model with a cache of `num_blocks` blocks, whose sequences take blocks in turn."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        blocks: int = 64,
    ) -> None:
        place = torch.device(device)
        model = load_model(folder, read_config(folder), device=place, dtype=dtype, progress=False)
        cache = CachePlan(num_blocks=blocks, max_model_len=512)
        self._runner = ModelRunner(model, device=place, dtype=dtype, cache=cache)
        self._free = list(range(blocks))[::-1]
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def run(self, chunks: dict[int, list[int]]) -> dict[int, Tensor]:
        """One pass: the next tokens of some sequences; logits [tokens, V] of each."""
        size = self._runner.block_size
        offsets, positions, tables = [0], [], []
        for sequence, tokens in chunks.items():
            start = self._lengths.get(sequence, 0)
            end = self._lengths[sequence] = start + len(tokens)
            blocks = self._blocks.setdefault(sequence, [])
            while len(blocks) * size < end:
                blocks.append(self._free.pop())
            offsets.append(offsets[-1] + len(tokens))
            positions += range(start, end)
            tables.append(blocks)
        widest = max(len(blocks) for blocks in tables)
        batch = Batch(
            token_ids=torch.tensor([t for tokens in chunks.values() for t in tokens]),
            positions=torch.tensor(positions, dtype=torch.int32),
            query_offsets=torch.tensor(offsets, dtype=torch.int32),
            context_lens=torch.tensor([self._lengths[s] for s in chunks], dtype=torch.int32),
            block_tables=torch.tensor(
                [blocks + [-1] * (widest - len(blocks)) for blocks in tables], dtype=torch.int32
            ),
            logit_rows=torch.arange(len(positions)),
        )
        logits = self._runner.run(batch).cpu()
        return {s: logits[offsets[i] : offsets[i + 1]] for i, s in enumerate(chunks)}


def logits_of(folder: Path, tokens: list[int], dtype: torch.dtype, device: str) -> Tensor:
    """Logits [tokens, V] of one sequence in one pass."""
    return Runner(folder, dtype, device).run({0: tokens})[0]
