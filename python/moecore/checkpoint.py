"""Checkpoints in safetensors files: which tensors there are, and views of them without a copy."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moecore import _core
from moecore.errors import FormatError
from moecore.safetensors_header import TensorInfo, format_error, read_header, unique_keys

__all__ = ["Checkpoint", "FormatError", "Part", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")
# A mapping that nobody writes to needs no swap for its pages, however large its file.
_MAP = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_PACKED_DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # of PackedWeights


class Part(NamedTuple):
    """A tensor, or one index of its first dimension."""

    info: TensorInfo
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one folder.

    `open` reads headers only, and checks them: after it, every tensor lies inside its file, shares
    no byte with another, and has one place.

    Example:
        >>> checkpoint = Checkpoint.open("Qwen3-30B-A3B")
        >>> checkpoint.info("model.norm.weight").shape
        (2048,)
    """

    folder: Path
    tensors: dict[str, TensorInfo]  # in the order of files and offsets
    stamps: dict[str, tuple[int, int]]  # of each file when its header was read; see _stamp

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of a folder's safetensors files.

        Args:
            folder: holds model.safetensors, or model.safetensors.index.json and the files it names,
                or exactly one *.safetensors of another name; looked for in this order.

        Raises:
            FileNotFoundError: the folder holds none of these.
            FormatError: a file is cut, its header lies, or the index does not fit the files; the
                message names tensor, file, what was expected and what was found.
        """
        folder = Path(folder)
        files, index = _find_files(folder)
        tensors: dict[str, TensorInfo] = {}
        stamps = {file: _stamp((folder / file).stat()) for file in files}
        for file in files:
            for info in read_header(folder / file):
                first = tensors.setdefault(info.name, info)
                if first is not info:
                    raise format_error(
                        info.name, file, "one place for each tensor", f"it in {first.file} too"
                    )
        for name, file in index.items():
            if name not in tensors or tensors[name].file != file:
                found = f"it in {tensors[name].file}" if name in tensors else "no such tensor"
                raise format_error(name, file, f"the tensor, as {INDEX_FILE} says", found)
        return cls(folder, tensors, stamps)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of files and offsets."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor; KeyError, with the folder, if there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"Checkpoint: no tensor {name} in {self.folder}") from None

    def part(self, name: str, index: int | None = None) -> Part:
        """Where a tensor lies, or one index of its first dimension."""
        info = self.info(name)
        if index is None:
            return Part(info, info.shape, info.offset, info.nbytes)
        count = info.shape[0] if info.shape else 0
        if not 0 <= index < count:
            raise ValueError(
                f"Checkpoint: index must be in [0, {count}) for {name} of shape "
                f"{list(info.shape)}, got {index}"
            )
        nbytes = info.nbytes // count
        return Part(info, info.shape[1:], info.offset + index * nbytes, nbytes)

    def reader(self) -> Reader:
        """A new Reader of this checkpoint."""
        return Reader(self)

    def tensor(self, name: str) -> Tensor:
        """A view of the whole tensor; see Reader."""
        return self.reader().view(self.part(name))

    def expert(self, name: str, index: int) -> Tensor:
        """A view of one index of the tensor's first dimension; no other byte is read."""
        return self.reader().view(self.part(name, index))


class Reader:
    """A checkpoint's tensors on the CPU, as views of files that it keeps mapped. For one thread.

    A page is read when it is touched, and counts as memory of the process until the reader (or its
    `with` block) and all of its views are gone. The files of `pack` are open for as long.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: dict[str, mmap.mmap] = {}
        self._files: dict[str, FileIO] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()
        while self._files:
            self._files.popitem()[1].close()

    def view(self, part: Part) -> Tensor:
        """The part of the checkpoint, in memory that the file is mapped to."""
        info = part.info
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            expected = f"a dtype among {', '.join(DTYPES)}"
            raise format_error(info.name, info.file, expected, info.dtype)
        if part.nbytes == 0:
            return torch.empty(part.shape, dtype=dtype)
        count = part.nbytes // dtype.itemsize
        memory = self._memory(info.file)
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=part.offset).view(
            part.shape
        )

    def pack(
        self,
        packings: Iterable[tuple[_core.PackedWeights, int, Sequence[Part]]],
        num_threads: int,
    ) -> None:
        """Read groups of packed weights, each of which is the rows of matrices in turn.

        Raises:
            FormatError: a file has changed since its header was read.
            OSError: the system could not read it.
        """
        parts: list[Part] = []
        native = []
        for weights, group, matrices in packings:
            dtype = _PACKED_DTYPES[weights.dtype]
            files = []
            for part in matrices:
                info, (rows, k_dim), offset, _ = part
                if info.dtype != dtype:
                    raise ValueError(
                        f"Checkpoint: {info.name} must be {weights.dtype}, as the packed weights, "
                        f"got {info.dtype}"
                    )
                files.append((self._file(info.file), offset, rows, k_dim))
            parts += matrices
            native.append((weights, group, files))
        try:
            _core.PackedWeights.pack_files(native, num_threads)
        except _core.FileReadError as error:
            info, _, offset, nbytes = parts[error.matrix]
            path = self._checkpoint.folder / info.file
            place = f"{nbytes} bytes from {offset}"
            if not error.error_number:
                raise format_error(info.name, path, place, f"{error.found}") from None
            what = f"{info.name}: expected {place}, found {error.found}"
            reason = f"{os.strerror(error.error_number)} ({what})"
            raise OSError(error.error_number, reason, str(path)) from None

    def _memory(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with self._open(file) as opened:
                protection = mmap.PROT_READ | mmap.PROT_WRITE  # torch has no views of read-only
                self._maps[file] = mmap.mmap(opened.fileno(), 0, flags=_MAP, prot=protection)
        return self._maps[file]

    def _file(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = self._open(file)
            # Twice the readahead: from a disk, several places of a file are read by turns.
            os.posix_fadvise(self._files[file].fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._files[file].fileno()

    def _open(self, file: str) -> FileIO:
        path = self._checkpoint.folder / file
        opened = FileIO(path)
        if _stamp(os.fstat(opened.fileno())) != self._checkpoint.stamps[file]:
            opened.close()
            expected = "the file whose header was read"
            raise format_error("data", path, expected, "that it has changed since")
        return opened


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """What changes when a file's content does: its size and time in nanoseconds."""
    return status.st_size, status.st_mtime_ns


def holds_checkpoint(folder: Path) -> bool:
    """Whether there is anything in a folder that `Checkpoint.open` would read, right or wrong."""
    return (folder / INDEX_FILE).is_file() or any(folder.glob("*.safetensors"))


def _find_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names of a checkpoint, and the file of each tensor where an index says so."""
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE], {}
    if (folder / INDEX_FILE).is_file():
        index = _read_index(folder / INDEX_FILE)
        files = sorted(set(index.values()))
        for file in files:
            if not (folder / file).is_file():
                name = next(name for name in index if index[name] == file)
                raise format_error(name, INDEX_FILE, f"it in {file}", f"no such file in {folder}")
        return files, index
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1:
        return others, {}
    hint = "; weights in pickled *.bin files are not read" if any(folder.glob("*.bin")) else ""
    raise FileNotFoundError(
        f"Checkpoint: folder must hold {SINGLE_FILE}, {INDEX_FILE} with its files, or one "
        f"*.safetensors, got {folder} with {', '.join(others) or 'no *.safetensors'}{hint}"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise format_error("index", path, "JSON with an object weight_map", repr(error)) from None
    for name, file in items.items():
        # A file outside the folder would let a checkpoint read what its user did not name.
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            expected = "the name of a *.safetensors file in the same folder"
            raise format_error(name, path, expected, repr(file))
    return items
