"""Model families: one file each, found by the `model_type` of config.json."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from moecore._core import UnsupportedError
from moecore.config import ConfigReader, ModelConfig
from moecore.models.names import CheckpointNames

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


class Family(Protocol):
    """What a family's module provides."""

    NAMES: CheckpointNames

    @staticmethod
    def read_config(keys: ConfigReader) -> ModelConfig: ...


def family_of(model_type: str, path: Path | str = "config.json") -> Family:
    """Return the module of a model family.

    Raises:
        UnsupportedError: no such family; the message lists those that exist.
    """
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}; "
            "moecore.integrations.transformers runs the experts of more families"
        )
    module: Family = import_module(f"moecore.models.{model_type}")  # type: ignore[assignment]
    return module
