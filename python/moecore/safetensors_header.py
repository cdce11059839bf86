"""The header of a safetensors file, read and checked against the file it heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moecore.errors import FormatError

_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    name: str
    file: str  # name within the checkpoint's folder
    dtype: str  # as safetensors names it: "BF16", "F32", "F8_E4M3", ...
    shape: tuple[int, ...]
    nbytes: int
    offset: int  # of its first byte in the file


def format_error(what: str, file: str | Path, expected: str, found: str) -> FormatError:
    """What (a tensor, or a part of the file) is wrong, where, and how."""
    return FormatError(f"{what} in {file}: expected {expected}, found {found}")


def read_header(path: Path) -> list[TensorInfo]:
    """Read and check the header of one safetensors file; its tensors in the order of offsets.

    Raises:
        FormatError: the header does not describe this file.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(8)
        length = int.from_bytes(length_bytes, "little")
        if len(length_bytes) < 8 or length > min(file_size - 8, _HEADER_LIMIT):
            raise format_error(
                "header",
                path,
                "8 bytes with its length, and that many more",
                f"length {length} in a file of {file_size} bytes",
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
            if not isinstance(header, dict):
                raise ValueError(f"a {type(header).__name__}")
        except (ValueError, RecursionError) as error:
            raise format_error("header", path, "a JSON object", str(error)) from error
    header.pop("__metadata__", None)
    data_begin = 8 + length
    file_name = path.name
    tensors = [
        _tensor_info(name, entry, path, file_name, data_begin) for name, entry in header.items()
    ]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(tensors, path, data_begin, file_size)
    return tensors


def _tensor_info(name: str, entry: Any, path: Path, file_name: str, data_begin: int) -> TensorInfo:
    """One entry of a header, its offsets fitting its shape and dtype."""
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        begin, end = offsets
        fits = isinstance(dtype, str) and isinstance(shape, list)
        for number in (begin, end, *shape):
            fits = fits and type(number) is int and number >= 0
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise format_error(name, path, "dtype, shape and two data_offsets", repr(entry))
    if dtype not in _BITS:
        raise format_error(name, path, f"a dtype among {', '.join(_BITS)}", repr(dtype))
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
    if (end - begin) * 8 != bits:
        raise format_error(
            name,
            path,
            f"{bits / 8:g} bytes for {dtype} of shape {shape}",
            f"data_offsets {offsets}, {end - begin} bytes",
        )
    return TensorInfo(name, file_name, dtype, tuple(shape), end - begin, data_begin + begin)


def _check_layout(tensors: list[TensorInfo], path: Path, data_begin: int, file_size: int) -> None:
    """Tensors in the order of offsets must follow one another and fill the file."""
    end, before = data_begin, "the header"
    for info in tensors:
        if info.offset != end:
            kind = "overlap" if info.offset < end else "gap"
            raise format_error(
                info.name,
                path,
                f"its first byte at {end}, where {before} ends",
                f"{info.offset} ({kind})",
            )
        end, before = info.offset + info.nbytes, info.name
        if end > file_size:
            raise format_error(
                info.name, path, f"its last byte before {end}", f"a file of {file_size} bytes"
            )
    if end != file_size:
        raise format_error("data", path, f"{end} bytes, where {before} ends", f"{file_size}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for json that refuses a key given twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice} twice")
    return result
