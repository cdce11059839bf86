"""Which tensors of a checkpoint fill which weights of a model, all checked before any is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moecore._core import PackedWeights
from moecore.checkpoint import DTYPES, Checkpoint, Part
from moecore.errors import FormatError
from moecore.safetensors_header import TensorInfo, format_error

_SHOWN_PROBLEMS = 8

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or one expert of it."""

    name: str
    shape: tuple[int, ...]  # of the tensor in the file
    expert: int | None = None  # take this index of the first dimension

    def __str__(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


class Packing(NamedTuple):
    """A group of packed weights, whose rows are a slot's tensors one after the other."""

    weights: PackedWeights
    group: int


@dataclass(frozen=True)
class WeightSlot:
    """A place in the model, and where its weights are found.

    `load` is called once, with one tensor for each source of the first alternative whose names are
    all in the checkpoint. The tensors may be views of a mapped file: load copies, and keeps none of
    them. With `packing`, tensors that the checkpoint holds in the slot's dtype are packed straight
    out of their files, and load is not called. Different slots may load at once, on different
    threads. A slot without `load` is another rank's: its tensors must be there and fit, and are not
    read.
    """

    alternatives: tuple[tuple[Source, ...], ...]
    load: Callable[..., object] | None
    dtype: torch.dtype | None = None  # of the tensors that load gets (default: load_weights' dtype)
    packing: Packing | None = None  # what load does, if all it does is to pack


class Job(NamedTuple):
    """One slot of this rank, and all that it reads."""

    load: Callable[..., object]
    parts: list[Part]  # of the files, one of each source
    dtype: torch.dtype  # of the tensors that load gets
    nbytes: int  # in the files
    packing: Packing | None  # to be done instead of load


def plan_load(
    checkpoint: Checkpoint,
    slots: Sequence[WeightSlot],
    dtype: torch.dtype,
    ignore: Sequence[str],
) -> list[Job]:
    """Jobs in the order of the files; FormatError if anything does not fit. See load_weights."""
    ignored = _compile(ignore)
    tensors = checkpoint.tensors
    chosen: list[tuple[WeightSlot, tuple[Source, ...]]] = []
    known: set[str] = set()
    problems: list[FormatError] = []
    for slot in slots:
        found = None
        for sources in slot.alternatives:
            is_there = found is None
            for source in sources:
                known.add(source.name)
                is_there = is_there and source.name in tensors
            if is_there:
                found = sources
        if found is None:
            problems.extend(_missing(checkpoint, slot))
        else:
            chosen.append((slot, found))
            for source in found:
                problems.extend(_misfits(tensors[source.name], source, slot.dtype or dtype))
    for info in tensors.values():
        if info.name not in known and not any(pattern.search(info.name) for pattern in ignored):
            what = f"{info.dtype} of shape {list(info.shape)}"
            problems.append(
                format_error(info.name, info.file, "no tensor that the model does not use", what)
            )
    if problems:
        raise _summary(checkpoint, problems)
    jobs = [
        _job(checkpoint, slot, slot.load, sources, slot.dtype or dtype)
        for slot, sources in chosen
        if slot.load is not None
    ]
    jobs.sort(key=lambda job: (job.parts[0].info.file, job.parts[0].offset))
    return jobs


def _job(
    checkpoint: Checkpoint,
    slot: WeightSlot,
    load: Callable[..., object],
    sources: tuple[Source, ...],
    dtype: torch.dtype,
) -> Job:
    parts, nbytes, as_stored = [], 0, True
    for source in sources:
        part = checkpoint.part(source.name, source.expert)
        parts.append(part)
        nbytes += part.nbytes
        as_stored = as_stored and DTYPES.get(part.info.dtype) == dtype
    return Job(load, parts, dtype, nbytes, slot.packing if as_stored else None)


def _missing(checkpoint: Checkpoint, slot: WeightSlot) -> Iterator[FormatError]:
    """What lacks to the alternative that lacks least."""

    def lacking(sources: tuple[Source, ...]) -> list[Source]:
        return [source for source in sources if source.name not in checkpoint.tensors]

    nearest = min(slot.alternatives, key=lambda sources: len(lacking(sources)))
    others = [
        " + ".join(source.name for source in sources)
        for sources in slot.alternatives
        if sources is not nearest
    ]
    instead = f" (or instead {', or '.join(others)})" if others else ""
    for source in lacking(nearest):
        expected = f"a tensor of shape {list(source.shape)}{instead}"
        yield format_error(source.name, checkpoint.folder.name, expected, "none")


def _misfits(info: TensorInfo, source: Source, dtype: torch.dtype) -> Iterator[FormatError]:
    if info.shape != source.shape:
        found = f"shape {list(info.shape)}"
        yield format_error(info.name, info.file, f"shape {list(source.shape)}", found)
    elif source.expert is not None and not 0 <= source.expert < (*info.shape, 0)[0]:
        found = f"shape {list(info.shape)}"
        yield format_error(info.name, info.file, f"an expert {source.expert}", found)
    stored = DTYPES.get(info.dtype)
    if stored != dtype and not (stored in _FLOATS and dtype in _FLOATS):
        expected = f"a dtype that can become {str(dtype).removeprefix('torch.')}"
        yield format_error(info.name, info.file, expected, info.dtype)


def _summary(checkpoint: Checkpoint, problems: list[FormatError]) -> FormatError:
    lines = [f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    header = f"load_weights: checkpoint must fit the model, got {count}"
    return FormatError("\n".join([f"{header} in {checkpoint.folder}:", *lines]))


def _compile(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    try:
        if isinstance(patterns, str):
            raise TypeError
        return [re.compile(pattern) for pattern in patterns]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"load_weights: ignore must be a list of regular expressions, got {patterns!r} {error}"
        ) from None
