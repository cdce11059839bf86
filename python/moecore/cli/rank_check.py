"""What `moecore doctor` says of expert parallelism: what ranks need, and what is there of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moecore.cli.check import Check

_SHARED_MEMORY = Path("/dev/shm")
_NEEDED_BYTES = 40 << 20  # of a group's segment, at most


def rank_check(name: str, usable_cpus: float, num_gpus: int, has_nccl: bool) -> Check:
    """Judge whether ranks can meet: through shared memory on the CPU, through NCCL on GPUs."""
    from moecore.expert_parallel.environment import launch_from_environment

    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else 0
    facts: dict[str, Any] = {
        "shared_memory_free": free,
        "usable_cpus": usable_cpus,
        "gpus": num_gpus,
        "launch": None,
    }
    try:
        launch = launch_from_environment()
    except ValueError as error:
        advice = "start with torchrun or srun, or unset WORLD_SIZE"
        return Check(name, "problem", str(error).removeprefix("LLM: "), advice, facts)
    parts = [f"up to {int(usable_cpus)} ranks on the CPU, {free / 2**20:.0f} MiB in /dev/shm"]
    if num_gpus > 1:
        parts.append(f"up to {num_gpus} on GPUs" if has_nccl else f"{num_gpus} GPUs without NCCL")
    if launch is not None:
        facts["launch"] = {"rank": launch.rank, "size": launch.size}
        parts.append(f"started as rank {launch.rank} of {launch.size}")
    detail = "; ".join(parts)
    if free < _NEEDED_BYTES:
        advice = (
            f"ranks on the CPU need {_NEEDED_BYTES >> 20} MiB in /dev/shm: "
            "docker run --shm-size=1g, or remove files from it"
        )
        return Check(name, "note", detail, advice, facts)
    if num_gpus > 1 and not has_nccl:
        return Check(name, "note", detail, "see NCCL above", facts)
    return Check(name, "ok", detail, facts=facts)
