"""Weights from a checkpoint into their final places: everything checked first, then streamed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from moecore import _core
from moecore.checkpoint import Checkpoint
from moecore.load_plan import Packing, Source, WeightSlot, plan_load
from moecore.weight_stream import WeightStream

__all__ = ["LoadReport", "Packing", "Source", "WeightSlot", "dummy_weights", "load_weights"]

_DUMMY_STD = 0.02
_DUMMY_VALUES = 4_194_301  # a prime: rows of no width repeat within it


class LoadReport(NamedTuple):
    """What was read, and how long it took."""

    bytes: int
    seconds: float


def load_weights(
    checkpoint: Checkpoint,
    slots: Sequence[WeightSlot],
    *,
    dtype: torch.dtype,
    ignore: Sequence[str] = (),
    progress: bool = True,
    num_threads: int | None = None,
    check: Callable[[], object] | None = None,
) -> LoadReport:
    """Load every slot: what is packed, then the others, each in the order of the files.

    Nothing is loaded unless everything fits: no slot without its tensors, no tensor without a slot,
    every shape as the source says, every dtype one that can become the slot's (float64, float32,
    float16 and bfloat16 become one another; any other must be the same). The process then holds, on
    top of the final weights, at most 128 MB of mapped file or one slot's tensors, and for each
    thread half a megabyte (or 64 rows) of what is packed, which it keeps, and one slot's tensors in
    their new dtype, if that differs.

    Args:
        checkpoint: as `Checkpoint.open` gives it.
        slots: of the model. Several may read one tensor.
        dtype: of the tensors handed to the slots that name none.
        ignore: regular expressions; tensors in which one is found need no slot.
        progress: show a bar with the rate, if stderr is a terminal.
        num_threads: threads that read and load (default: those of the core, at most 16).
        check: called between parts of the load; what it raises ends the load.

    Returns:
        LoadReport(bytes, seconds).

    Raises:
        FormatError: the checkpoint does not fit; the message lists the first problems by tensor,
            file, what was expected and what was found.
        ValueError: `ignore` or `num_threads` is out of range.
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"load_weights: num_threads must be >= 1, got {num_threads}")
    num_threads = min(_core.num_threads(), 16) if num_threads is None else num_threads
    jobs = plan_load(checkpoint, slots, dtype, ignore)
    begin = time.perf_counter()
    total = sum(job.nbytes for job in jobs)
    with tqdm(
        desc="Loading weights",
        total=total,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:

        def done(nbytes: int) -> None:
            bar.update(nbytes)
            if check is not None:
                check()

        WeightStream(checkpoint, num_threads, done).run(jobs)
    return LoadReport(total, time.perf_counter() - begin)


def dummy_weights(
    slots: Iterable[WeightSlot],
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | None = None,
) -> None:
    """Load every slot with random values instead of a checkpoint's, for tests of speed.

    Values are normal with deviation 0.02, drawn from a table of four million; integers are zero.
    Those of a source depend on the seed, its name and its expert only: every rank of an
    expert-parallel group sees the same model.

    Args:
        slots: their first alternative says what load gets.
        dtype: as in `load_weights`.
        seed: any integer.
        device: where the values are made, the same everywhere (default: the CPU).
    """
    generator = torch.Generator().manual_seed(_hash(f"{seed}"))
    table = torch.randn(_DUMMY_VALUES, generator=generator).mul_(_DUMMY_STD)
    tables: dict[torch.dtype, Tensor] = {}
    for slot in slots:
        if slot.load is None:
            continue
        slot_dtype = slot.dtype or dtype
        if slot_dtype not in tables:
            values = table if slot_dtype.is_floating_point else torch.zeros_like(table)
            tables[slot_dtype] = values.to(slot_dtype).repeat(2).to(device)
        slot.load(*(_dummy(s, tables[slot_dtype], seed) for s in slot.alternatives[0]))


def _dummy(source: Source, table: Tensor, seed: int) -> Tensor:
    shape = source.shape if source.expert is None else source.shape[1:]
    tensor = torch.empty(prod(shape), dtype=table.dtype, device=table.device)
    start = _hash(f"{seed} {source}") % _DUMMY_VALUES
    for begin in range(0, tensor.numel(), _DUMMY_VALUES):
        part = tensor[begin : begin + _DUMMY_VALUES]
        part.copy_(table[start : start + part.numel()])
    return tensor.view(shape)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
