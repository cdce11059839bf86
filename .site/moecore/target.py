"""Which device and dtype a model runs in."""

from __future__ import annotations

from pathlib import Path

import torch

from moecore._core import UnsupportedError, build_info
from moecore.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device that `LLM(device=...)` means; "auto" as its documentation says."""
    has_kernels = bool(build_info()["has_cuda"])
    if device == "auto":
        device = "cuda" if has_kernels and torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"LLM: device must be 'auto', 'cpu' or 'cuda', got {str(device)!r}")
    if place.type == "cuda" and not has_kernels:
        raise UnsupportedError(
            "LLM: device 'cuda' needs moecore built with nvcc; this build is not"
        )
    if place == torch.device("cuda"):  # without a number
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def choose_dtype(dtype: str | torch.dtype, config: ModelConfig, folder: Path) -> torch.dtype:
    """Return the dtype that `LLM(dtype=...)` means; "auto" is the checkpoint's own."""
    if dtype == "auto":
        if config.dtype not in _DTYPES.values():
            raise UnsupportedError(
                f"LLM: {folder} is {config.dtype}, which dtype='auto' does not convert; pass "
                "dtype='bfloat16' or dtype='float32'"
            )
        return config.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"LLM: dtype must be 'auto', 'float32' or 'bfloat16', got {name!r}")
    return _DTYPES[name]
