"""From what LLM was asked for to an engine: the model, its tokenizer, its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moecore.batch import ModelRunner as BatchRunner
from moecore.config import ModelConfig, read_config
from moecore.engine import Engine
from moecore.hub import resolve_model
from moecore.model_runner import CachePlan, ModelRunner, plan_cache
from moecore.models.decoder import CausalLM
from moecore.models.load import load_model
from moecore.target import choose_device, choose_dtype
from moecore.tokenizer import Tokenizer
from moecore.transport import Transport


@dataclass(frozen=True)
class EngineOptions:
    """The arguments of LLM that say what an engine computes; plain values, documented there.

    Raises:
        ValueError: one is out of range.
    """

    model: str | None
    device: str
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory: int | None
    load_format: str
    revision: str | None
    seed: int
    skip_tokenizer_init: bool
    enforce_eager: bool

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(
                f"LLM: load_format must be 'auto' or 'dummy', got {self.load_format!r}"
            )
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"LLM: {name} must be at least 1, got {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "LLM: max_num_batched_tokens must be at least max_num_seqs "
                f"({self.max_num_seqs}), got {self.max_num_batched_tokens}"
            )


class Assembly:
    """The parts of one engine, in the order in which they are had: read, load, run.

    Making one reads the small files and checks the options; `load` reads the weights.

    Raises:
        FileNotFoundError, FormatError, UnsupportedError, ValueError: as LLM says.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.folder = resolve_model(options.model, options.revision)
        self.config: ModelConfig = read_config(self.folder)
        self.tokenizer = None if options.skip_tokenizer_init else Tokenizer.from_folder(self.folder)
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.config, self.folder)
        self._cache = self._plan_cache()
        self._network: CausalLM | None = None

    def load(
        self,
        *,
        transport: Transport | None = None,
        progress: bool,
        check: Callable[[], object] | None = None,
    ) -> CachePlan:
        """Load the weights, and return the cache to be had.

        Args:
            transport: of an expert-parallel rank, which loads its share of the experts.
            progress: show a bar.
            check: called now and then; what it raises ends the load.
        """
        options = self.options
        self._network = load_model(
            self.folder,
            self.config,
            device=self.device,
            dtype=self.dtype,
            dummy_seed=options.seed if options.load_format == "dummy" else None,
            progress=progress,
            transport=transport,
            check=check,
        )
        if self.device.type == "cuda":  # with the memory that the weights have left
            self._cache = self._plan_cache()
        return self._cache

    def runner(self, cache: CachePlan, transport: Transport | None = None) -> ModelRunner:
        """Give the loaded model a cache; `transport` as for `load`."""
        assert self._network is not None
        # Layers over NCCL can be captured, too, but models with such graphs were not seen to run.
        uses_graphs = not self.options.enforce_eager and (
            transport is None or (transport.kind == "peer" and transport.can_capture)
        )
        return ModelRunner(
            self._network,
            device=self.device,
            dtype=self.dtype,
            cache=cache,
            max_num_seqs=self.options.max_num_seqs if uses_graphs else 0,
            transport=transport,
        )

    def engine(self, runner: BatchRunner) -> Engine:
        """The engine on that runner."""
        return Engine(
            runner,
            self.tokenizer,
            eos_token_ids=self.config.eos_token_ids,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=self.options.max_num_batched_tokens,
            seed=self.options.seed,
        )

    def _plan_cache(self) -> CachePlan:
        options = self.options
        return plan_cache(
            self.config,
            self.dtype,
            self.device,
            options.max_model_len,
            options.max_num_seqs,
            options.kv_cache_memory,
        )


def plain_name(value: str | torch.device | torch.dtype) -> str:
    """A device or dtype as an option: "cuda:1", "bfloat16"."""
    return str(value).removeprefix("torch.")
