"""Checkpoints in safetensors files: which tensors there are, and views of them without a copy."""

from __future__ import annotations

import json
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moecore.errors import FormatError
from moecore.safetensors_header import TensorInfo, format_error, read_header, unique_keys

__all__ = ["Checkpoint", "FormatError", "TensorInfo"]

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

    def reader(self) -> Reader:
        """A new Reader of this checkpoint."""
        return Reader(self)

    def tensor(self, name: str) -> Tensor:
        """A view of the whole tensor; see Reader."""
        return self.reader().tensor(name)

    def expert(self, name: str, index: int) -> Tensor:
        """A view of one index of the tensor's first dimension; see Reader."""
        return self.reader().expert(name, index)


class Reader:
    """Views of a checkpoint's tensors on the CPU, over files that it keeps mapped. For one thread.

    A page is read when it is touched, and counts as memory of the process until the reader (or its
    `with` block) and all of its views are gone.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, mmap.mmap] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def tensor(self, name: str) -> Tensor:
        """A view of the whole tensor."""
        info = self._checkpoint.info(name)
        return self._view(info, info.shape, info.offset, info.nbytes)

    def expert(self, name: str, index: int) -> Tensor:
        """A view of one index of the tensor's first dimension; no other byte is read."""
        info = self._checkpoint.info(name)
        count = info.shape[0] if info.shape else 0
        if not 0 <= index < count:
            raise ValueError(
                f"Checkpoint: index must be in [0, {count}) for {name} of shape "
                f"{list(info.shape)}, got {index}"
            )
        nbytes = info.nbytes // count
        return self._view(info, info.shape[1:], info.offset + index * nbytes, nbytes)

    def _view(self, info: TensorInfo, shape: tuple[int, ...], offset: int, nbytes: int) -> Tensor:
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            expected = f"a dtype among {', '.join(DTYPES)}"
            raise format_error(info.name, info.file, expected, info.dtype)
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        count = nbytes // dtype.itemsize
        memory = self._memory(info.file)
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)

    def _memory(self, file: str) -> mmap.mmap:
        if file not in self._files:
            path = self._checkpoint.folder / file
            with path.open("rb") as opened:
                if _stamp(os.fstat(opened.fileno())) != self._checkpoint.stamps[file]:
                    expected = "the file whose header was read"
                    raise format_error("data", path, expected, "that it has changed since")
                protection = mmap.PROT_READ | mmap.PROT_WRITE  # torch has no views of read-only
                self._files[file] = mmap.mmap(opened.fileno(), 0, flags=_MAP, prot=protection)
        return self._files[file]


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
