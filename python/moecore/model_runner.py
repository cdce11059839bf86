"""The model, its cache and its device: what the engine runs a batch on."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moecore.attention import Attention, NativeAttention, TorchAttention, bytes_per_block
from moecore.batch import Batch, DecodeBatch
from moecore.config import ModelConfig
from moecore.decode_graphs import DecodeGraphs, graph_sizes
from moecore.models.decoder import CausalLM
from moecore.rope import cos_sin_table
from moecore.transport import Transport

BLOCK_SIZE = NativeAttention.block_size
_CPU_CACHE_LIMIT = 4 << 30
_GPU_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class CachePlan:
    """Room for keys and values."""

    num_blocks: int
    max_model_len: int  # tokens of one sequence


def plan_cache(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None,
    max_num_seqs: int,
    kv_cache_memory: int | None,
) -> CachePlan:
    """Decide how many blocks the cache has, and how long a sequence may be.

    Raises:
        ValueError: max_model_len is above the model's limit, or does not fit into kv_cache_memory.
    """
    limit = config.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise ValueError(
            f"LLM: max_model_len must be at most max_position_embeddings ({limit}), "
            f"got {max_model_len}"
        )
    block_bytes = bytes_per_block(config, dtype, BLOCK_SIZE)
    blocks_of_one = -(-(max_model_len or limit) // BLOCK_SIZE)
    if kv_cache_memory is None:
        memory = min(_memory_limit(device), blocks_of_one * max_num_seqs * block_bytes)
    else:
        memory = kv_cache_memory
    num_blocks = memory // block_bytes
    if num_blocks < 1 or (max_model_len is not None and num_blocks < blocks_of_one):
        raise ValueError(
            f"LLM: kv_cache_memory must hold {blocks_of_one if max_model_len else 1} blocks of "
            f"{BLOCK_SIZE} tokens, {block_bytes} bytes each, got {memory} bytes"
        )
    return CachePlan(num_blocks, max_model_len or min(limit, num_blocks * BLOCK_SIZE))


def _memory_limit(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_CACHE_LIMIT
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _GPU_CACHE_SHARE)


class ModelRunner:
    """Runs batches of `model`, its weights loaded, over a paged cache.

    On CUDA, passes of up to max_num_seqs decodes run as CUDA graphs, unless that is 0 or the
    attention is torch's. Over the ranks of `transport` all make their graphs together, and run
    them together: then `run` and `join` are told how many sequences any rank has.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        model: CausalLM,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cache: CachePlan,
        max_num_seqs: int = 0,
        transport: Transport | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self.num_blocks = cache.num_blocks
        self.max_model_len = cache.max_model_len
        self.vocab_size = model.config.vocab_size
        config = model.config
        self._cos_sin = cos_sin_table(
            config.rope, cache.max_model_len, config.max_position_embeddings
        ).to(device)
        is_native = NativeAttention.serves(config, dtype, device)
        self._needs_torch = device.type != "cpu" or not is_native  # beside the core
        attention = NativeAttention if is_native else TorchAttention
        self._attention: Attention = attention(config, dtype, cache.num_blocks, device)
        self._graphs: DecodeGraphs | None = None
        self._logits: Tensor | None = None
        if device.type == "cuda" and is_native and max_num_seqs > 0:
            with torch.inference_mode(), torch.cuda.device(device):
                self._graphs = DecodeGraphs(
                    model,
                    self._attention,
                    self._cos_sin,
                    sizes=graph_sizes(max_num_seqs),
                    max_blocks=-(-cache.max_model_len // self.block_size),
                    transport=transport,
                )
        self._is_alone = transport is None

    @property
    def has_graphs(self) -> bool:
        """Whether passes of few decodes run as CUDA graphs."""
        return self._graphs is not None

    def num_decodes(self, batch: Batch) -> int:
        """Sequences of a batch that a CUDA graph can run, or -1 if none can."""
        if self._graphs is None or not self._graphs.serves(batch):
            return -1
        return batch.context_lens.shape[0]

    def run(self, batch: Batch, most_decodes: int = -1) -> Tensor:
        """Return the logits [N, vocab_size] float32 of the batch's `logit_rows`.

        They are valid until the next run.

        Args:
            batch: on the CPU.
            most_decodes: of any rank, if all run a CUDA graph in this pass.
        """
        if not self._needs_torch:  # no operator of torch: no mode of torch
            return self._model.forward(
                batch, self._attention, self._cos_sin, out=self._logits_of(batch)
            )
        with torch.inference_mode():
            is_decode = self.num_decodes(batch) >= 0 if self._is_alone else most_decodes > 0
            if self._graphs is not None and is_decode:
                with torch.cuda.device(self._device):
                    return self._graphs.run(batch, most_decodes)
            if self._device.type != "cpu":
                tensors = {f.name: getattr(batch, f.name).to(self._device) for f in fields(Batch)}
                batch = Batch(**tensors)
            return self._model.forward(batch, self._attention, self._cos_sin)

    def _logits_of(self, batch: Batch) -> Tensor | None:
        """Memory for a decode's logits, kept for the next one of its size."""
        if not isinstance(batch, DecodeBatch):
            return None
        if self._logits is None or self._logits.shape[0] != batch.num_sequences:
            self._logits = torch.empty((batch.num_sequences, self.vocab_size))
        return self._logits

    @torch.inference_mode()
    def join(self, most_decodes: int = -1) -> None:
        """Take part in a pass of an expert-parallel group with no tokens of this rank's own.

        Args:
            most_decodes: as `run` takes it.
        """
        if self._graphs is not None and most_decodes > 0:
            with torch.cuda.device(self._device):
                self._graphs.join(most_decodes)
        else:
            self._model.join()
