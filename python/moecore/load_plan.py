"""Which tensors of a checkpoint fill which weights of a model, all checked before any is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moecore._core import PackedWeights
from moecore.checkpoint import DTYPES, Checkpoint
from moecore.errors import FormatError
from moecore.safetensors_header import TensorInfo, format_error

_SHOWN_PROBLEMS = 8

_FLOATS = ("F64", "F32", "F16", "BF16")


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
    sources: tuple[Source, ...]
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
        known.update(source.name for sources in slot.alternatives for source in sources)
        found = next((a for a in slot.alternatives if all(s.name in tensors for s in a)), None)
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
    order = {name: position for position, name in enumerate(tensors)}
    chosen.sort(key=lambda choice: (order[choice[1][0].name], choice[1][0].expert or 0))
    return [
        _job(tensors, slot, slot.load, sources, slot.dtype or dtype)
        for slot, sources in chosen
        if slot.load is not None
    ]


def _job(
    tensors: Mapping[str, TensorInfo],
    slot: WeightSlot,
    load: Callable[..., object],
    sources: tuple[Source, ...],
    dtype: torch.dtype,
) -> Job:
    nbytes, as_stored = 0, True
    for source in sources:
        info = tensors[source.name]
        as_stored = as_stored and DTYPES.get(info.dtype) == dtype
        nbytes += info.nbytes if source.expert is None else info.nbytes // info.shape[0]
    return Job(load, sources, dtype, nbytes, slot.packing if as_stored else None)


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
    found = f"shape {list(info.shape)}"
    if info.shape != source.shape:
        yield format_error(info.name, info.file, f"shape {list(source.shape)}", found)
    elif source.expert is not None and not 0 <= source.expert < (*info.shape, 0)[0]:
        yield format_error(info.name, info.file, f"an expert {source.expert}", found)
    converts = info.dtype in _FLOATS and dtype in (DTYPES[name] for name in _FLOATS)
    if not converts and DTYPES.get(info.dtype) != dtype:
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
