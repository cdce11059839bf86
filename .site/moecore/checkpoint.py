"""Checkpoints in safetensors files: which tensors there are, and views of them without a copy."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moecore.errors import FormatError
from moecore.safetensors_header import TensorInfo, format_error, read_header, unique_keys

__all__ = ["Checkpoint", "FormatError", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


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
        return cls(folder, tensors)

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
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def tensor(self, name: str) -> Tensor:
        """A view of the whole tensor."""
        info = self._checkpoint.info(name)
        tensor: Tensor = self._file(info.file).get_tensor(name)
        return tensor

    def expert(self, name: str, index: int) -> Tensor:
        """A view of one index of the tensor's first dimension; no other byte is read."""
        info = self._checkpoint.info(name)
        count = info.shape[0] if info.shape else 0
        if not 0 <= index < count:
            raise ValueError(
                f"Checkpoint: index must be in [0, {count}) for {name} of shape "
                f"{list(info.shape)}, got {index}"
            )
        tensor: Tensor = self._file(info.file).get_slice(name)[index]
        return tensor

    def _file(self, file: str) -> Any:
        if file not in self._files:
            path = self._checkpoint.folder / file
            try:
                self._files[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise format_error("header", path, "a whole file", str(error)) from error
        return self._files[file]


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
