"""What all ranks must have in common, found before any of them loads weights."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moecore import _core
from moecore.assembly import Assembly
from moecore.checkpoint import Checkpoint

_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each file of weights

Facts = dict[str, Any]


def facts_of(assembly: Assembly, size: int) -> Facts:
    """What this rank is about to run; `disagreement` compares it between ranks."""
    options, build = assembly.options, _core.build_info()
    on_cpu = assembly.device.type == "cpu"
    return {
        "expert_parallel_size": size,
        "moecore version": build["version"],
        "device": assembly.device.type,
        # Other instruction sets, and other GPUs, give other bits.
        "instruction set": build["cpu_isa"] if on_cpu else "",
        "GPU": "" if on_cpu else torch.cuda.get_device_name(assembly.device),
        "dtype": str(assembly.dtype).removeprefix("torch."),
        "model configuration": _digest(repr(assembly.config).encode()),
        "model weights": (
            "dummy" if options.load_format == "dummy" else weights_digest(assembly.folder)
        ),
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "kv_cache_memory": options.kv_cache_memory,
        "seed": options.seed,
        "skip_tokenizer_init": options.skip_tokenizer_init,
    }


def disagreement(mine: Mapping[str, Any], theirs: Mapping[str, Any], rank: int) -> str | None:
    """Say what differs between rank 0's facts and another's, or return None."""
    for name, value in mine.items():
        if theirs.get(name) != value:
            return (
                f"LLM: {name} must be the same on every rank, got {value!r} on rank 0 and "
                f"{theirs.get(name)!r} on rank {rank}"
            )
    return None


def weights_digest(folder: Path) -> str:
    """Name the weights of a folder: every header, and a sample of every file's bytes."""
    checkpoint = Checkpoint.open(folder)
    digest = hashlib.sha256()
    for info in checkpoint.tensors.values():
        digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        with (folder / file).open("rb") as stream:
            end = os.fstat(stream.fileno()).st_size - _SAMPLE_BYTES
            for i in range(_SAMPLES):
                stream.seek(max(0, end * i // (_SAMPLES - 1)))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def place_of_rank(device: torch.device) -> dict[str, Any]:
    """The machine, the processors, the threads and the device of a rank of this process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.exists() else ""
    return {
        "host": f"{socket.gethostname()} {boot_id}",
        "device": str(device),
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "threads": _core.num_threads(),
        "threads are chosen": "OMP_NUM_THREADS" in os.environ,
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
