"""A GGUF model run by llama.cpp on the CPU, through the C interface of llama-cpp-python.

The package's own class decodes one sequence at a time; here a step is one llama_decode of one
batch, whatever the number of sequences, and its logits are not copied.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

GGML_LOG_LEVEL_ERROR = 4


@llama_cpp.llama_log_callback
def _log_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == GGML_LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode())


class LlamaCpp:
    """One model and, for each number of sequences in use, a context with its caches.

    Args:
        path: a GGUF file.
        num_threads: of prompts and steps.
        max_len: tokens of a sequence, at most.
        exact: keeps caches and attention in float32; float16 is llama.cpp's default, and faster.
    """

    def __init__(self, path: Path, num_threads: int, max_len: int, *, exact: bool = False) -> None:
        llama_cpp.llama_log_set(_log_errors, None)
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"LlamaCpp: path must be a GGUF file of a known model, got {path}")
        self._num_threads = num_threads
        self._max_len = max_len
        self._exact = exact
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._contexts: dict[int, Any] = {}
        weakref.finalize(self, _free, self._model, self._contexts)

    def start(self, num_seqs: int) -> None:
        """Begin `num_seqs` empty sequences; those before are forgotten."""
        if num_seqs not in self._contexts:
            self._contexts[num_seqs] = self._new_context(num_seqs)
        self._context = self._contexts[num_seqs]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._num_seqs = num_seqs
        self._len = 0

    def decode(self, token_ids: NDArray[np.int32], every: bool = False) -> NDArray[np.float32]:
        """Append tokens to all sequences in one call.

        Args:
            token_ids: [num_seqs, n] int32.
            every: whether each token's logits are wanted, not the last one's alone.

        Returns:
            The logits, [num_seqs, n or 1, vocab] float32: a view that the next call overwrites.
        """
        num_seqs, count = token_ids.shape
        if num_seqs != self._num_seqs:
            raise ValueError(f"decode: token_ids must have {self._num_seqs} rows, got {num_seqs}")
        positions = np.tile(np.arange(self._len, self._len + count, dtype=np.int32), num_seqs)
        seq_ids = np.repeat(np.arange(num_seqs, dtype=np.int32), count)
        seq_pointers = seq_ids.ctypes.data + 4 * np.arange(seq_ids.size, dtype=np.uintp)
        ones = np.ones(seq_ids.size, dtype=np.int32)
        wanted = np.full((num_seqs, count), every, dtype=np.int8)
        wanted[:, -1] = True
        tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
        batch = llama_cpp.llama_batch(n_tokens=tokens.size)
        arrays = {"token": tokens, "pos": positions, "n_seq_id": ones, "logits": wanted}
        for field, kind in llama_cpp.llama_batch._fields_:
            if field in arrays:
                setattr(batch, field, arrays[field].ctypes.data_as(kind))
        batch.seq_id = ctypes.cast(seq_pointers.ctypes.data, type(batch.seq_id))
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"decode: llama_decode must return 0, got {status}")
        self._len += count
        shape = (num_seqs, count if every else 1, self._vocab_size)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape)

    def _new_context(self, num_seqs: int) -> Any:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = num_seqs * self._max_len
        settings.n_seq_max = num_seqs
        settings.n_threads = settings.n_threads_batch = self._num_threads
        if self._exact:
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(self._model, settings)
        if not context:
            raise MemoryError(f"LlamaCpp: no context of {settings.n_ctx} tokens")
        return context


def _free(model: Any, contexts: dict[int, Any]) -> None:
    for context in contexts.values():
        llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
