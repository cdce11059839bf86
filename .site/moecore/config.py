"""config.json of a checkpoint, read into one form that every model family shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moecore._core import RoutingConfig, UnsupportedError
from moecore.errors import FormatError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of a model."""

    theta: float
    rotary_dim: int  # leading elements of a head that are rotated
    scaling: Mapping[str, Any] = field(default_factory=dict)  # "rope_type" and its parameters


@dataclass(frozen=True)
class MoEConfig:
    """The routed experts of a layer, and the shared one.

    `routing` are the keywords of `ops.RoutingConfig`; `routing_class` names the scheme in
    one word: "softmax" (A), "raw_logits" (B), "softmax_groups" (C), "sigmoid_bias" (D).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    routing_class: str
    routing: Mapping[str, Any] = field(default_factory=dict)
    shared_intermediate_size: int = 0
    has_shared_gate: bool = False

    def routing_config(self) -> RoutingConfig:
        return RoutingConfig(top_k=self.top_k, **self.routing)


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to be built, whatever names its config.json gives it."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    moe: MoEConfig
    moe_layers: tuple[bool, ...]  # [num_layers]: False for a layer with a dense MLP
    intermediate_size: int = 0  # of the dense layers
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "per_head", "full_width"] = "none"
    clip_qkv: float | None = None


_REQUIRED: Any = object()


class ConfigReader:
    """Typed access to the keys of one config.json; errors name the key and the file."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw = raw
        self._path = path

    def fail(self, key: str, rule: str) -> FormatError:
        return FormatError(f"{self._path}: {key} must be {rule}, got {self._raw.get(key)!r}")

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        return self._raw.get(key, default)

    def integer(self, key: str, default: int | None = _REQUIRED, *, minimum: int = 1) -> int:
        value = self._raw.get(key)
        if value is None and default is not _REQUIRED and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.fail(key, f"an integer >= {minimum}")
        return value

    def number(self, key: str, default: float = _REQUIRED) -> float:
        value = self._raw.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, "a number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def only(self, key: str, supported: Any, default: Any) -> None:
        """Refuse every value of `key` but `supported`."""
        value = self._raw.get(key, default)
        if value != supported:
            raise UnsupportedError(
                f"{self._path}: {key} must be {supported!r} for {self.get('model_type')!r}, "
                f"got {value!r}"
            )

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self._raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.fail(key, "an integer or a list of integers")
        return tuple(ids)

    def dtype(self) -> torch.dtype:
        key = "dtype" if self.has("dtype") else "torch_dtype"
        name = str(self._raw.get(key) or "float32").removeprefix("torch.")
        value = getattr(torch, name, None)
        if not isinstance(value, torch.dtype):
            raise self.fail(key, "the name of a dtype")
        return value

    def rope(self, head_dim: int, default_theta: float) -> RopeConfig:
        """Rotary parameters of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling)."""
        rope = self.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise self.fail("rope_parameters", "an object")
        scaling = {**(self.get("rope_scaling") or {}), **rope}
        theta = scaling.pop("rope_theta", None) or self.number("rope_theta", default_theta)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        if kind not in ("default", "linear", "yarn"):
            raise UnsupportedError(
                f"{self._path}: rope_type must be 'default', 'linear' or 'yarn', got {kind!r}"
            )
        fraction = scaling.pop("partial_rotary_factor", None) or self.number(
            "partial_rotary_factor", 1.0
        )
        return RopeConfig(float(theta), int(head_dim * fraction), {**scaling, "rope_type": kind})


def read_config(folder: str | Path) -> ModelConfig:
    """Read the config.json (and generation_config.json) of a checkpoint folder.

    Raises:
        FileNotFoundError: there is no config.json; the message names the folder.
        FormatError: a key is missing or has a value that cannot be; names file, key and value.
        UnsupportedError: the model family, or a feature of it, is not implemented.
    """
    from moecore.models import family_of

    folder = Path(folder)
    path = folder / "config.json"
    raw = _read_json(path)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedError(
            f"{path}: quantization_config must be absent, got quant_method {method!r}; "
            "bfloat16 and float32 checkpoints load"
        )
    generation = folder / "generation_config.json"
    if generation.is_file():
        # Generation's end tokens win: chat models list their end-of-turn token only there.
        ids = _read_json(generation)
        raw.update({k: ids[k] for k in ("eos_token_id", "bos_token_id") if ids.get(k) is not None})
    return family_of(str(raw.get("model_type")), path).read_config(ConfigReader(raw, path))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a model folder holds config.json, tokenizer.json "
            "and *.safetensors"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: must be JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{path}: must hold a JSON object, got {type(raw).__name__}")
    return raw
