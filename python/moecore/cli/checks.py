"""What `moecore doctor` looks at: each check finds facts, judges them, and says what to do."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.resources
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moecore.cli.check import Check
from moecore.cli.rank_check import rank_check

_PACKAGES = ("tokenizers", "huggingface_hub", "jinja2", "tqdm", "rich", "numpy")
_OLDEST_TORCH = (2, 10)
_BUNDLED_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def run_checks() -> list[Check]:
    """All checks; one that fails itself is a problem with its error."""
    checks = []
    for name, check in _CHECKS.items():
        try:
            checks.append(check(name))
        except Exception as error:
            checks.append(
                Check(name, "problem", f"{type(error).__name__}: {error}", _ADVICE.get(name))
            )
    return checks


def _torch(name: str) -> Check:
    import torch

    version = str(torch.__version__)
    facts = {"version": version, "cuda": torch.version.cuda}
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    detail = f"{version}, built {cuda}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST_TORCH:
        return Check(name, "problem", f"{detail}; too old", _ADVICE[name], facts)
    return Check(name, "ok", detail, facts=facts)


def _build(name: str) -> Check:
    info = _build_info()
    cuda = f"CUDA {info['cuda_version']}" if info["has_cuda"] else "none"
    detail = f"moecore {info['version']}, {info['compiler']}, GPU kernels: {cuda}"
    return Check(name, "ok", detail, facts=info)


def _instruction_set(name: str) -> Check:
    info = _build_info()
    supported, used = list(info["cpu_isas"]), str(info["cpu_isa"])
    denied = str(info["cpu_isa_denied"])
    facts = {"supported": supported, "used": used, "denied": denied}
    detail = f"{used}, of {', '.join(supported)}"
    if denied:
        return Check(name, "note", f"{detail}; without {denied}", _ADVICE[name], facts)
    if used != supported[-1]:
        advice = f"MOECORE_CPU_ISA holds it back: unset it to use {supported[-1]}"
        return Check(name, "note", detail, advice, facts)
    if supported == ["scalar"]:
        advice = "this processor has neither AVX2 nor AVX-512: expect a fraction of the speed"
        return Check(name, "note", detail, advice, facts)
    return Check(name, "ok", detail, facts=facts)


def _threads(name: str) -> Check:
    import moecore

    threads, usable = moecore.num_threads(), _usable_cpus()
    facts = {"threads": threads, "usable_cpus": usable}
    detail = f"{threads} threads on {usable:g} processors that this process may use"
    if threads > usable:
        advice = f"they wait for one another: set OMP_NUM_THREADS={max(1, int(usable))}"
        return Check(name, "note", detail, advice, facts)
    if threads < int(usable):
        advice = f"for one process alone, OMP_NUM_THREADS={int(usable)} uses all processors"
        return Check(name, "note", detail, advice, facts)
    return Check(name, "ok", detail, facts=facts)


def _openmp(name: str) -> Check:
    _build_info()  # loads the core
    libraries = _mapped(r"lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")
    facts = {"libraries": libraries}
    if len(libraries) > 1:
        return Check(
            name, "note", f"{len(libraries)}: {', '.join(libraries)}", _ADVICE[name], facts
        )
    return Check(name, "ok", ", ".join(libraries) or "none loaded", facts=facts)


def _gpus(name: str) -> Check:
    import torch

    kernels = bool(_build_info()["has_cuda"])
    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    facts = {"kernels": kernels, "gpus": gpus}
    seen = "; ".join(
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, sm {gpu['compute_capability']}"
        for gpu in gpus
    )
    if gpus and not kernels:
        return Check(name, "note", f"{seen}; this build has no GPU kernels", _ADVICE[name], facts)
    if gpus:
        return Check(name, "ok", seen, facts=facts)
    if Path("/proc/driver/nvidia/version").exists():
        advice = (
            "install a torch for CUDA, and see that nvidia-smi and CUDA_VISIBLE_DEVICES show one"
        )
        return Check(name, "note", "a driver, but torch sees no GPU", advice, facts)
    return Check(name, "ok", "none; models run on the CPU", facts=facts)


def _nccl(name: str) -> Check:
    """The places in the order in which they are tried."""
    forced = os.environ.get("MOECORE_NCCL")
    system = ctypes.util.find_library("nccl")
    places = {
        "MOECORE_NCCL": [forced] if forced else [],
        "loaded in this process": _mapped(r"libnccl\.so[.\d]*$"),
        "nvidia-nccl wheel": _nccl_of_wheels(),
        "system": [system] if system else [],
    }
    facts: dict[str, Any] = {"places": places}
    if forced and not Path(forced).is_file():
        advice = "set MOECORE_NCCL to a libnccl.so.2, or unset it"
        return Check(name, "problem", f"MOECORE_NCCL names no file: {forced}", advice, facts)
    for place, found in places.items():
        if found:
            return Check(name, "ok", f"{found[0]} ({place})", facts=facts)
    return Check(name, "ok", "not found; only several GPUs need it", _ADVICE[name], facts)


def _ranks(name: str) -> Check:
    import torch

    has_nccl = any(_nccl("NCCL").facts["places"].values())
    return rank_check(name, _usable_cpus(), torch.cuda.device_count(), has_nccl)


def _huge_pages(name: str) -> Check:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not file.exists():
        return Check(
            name, "note", "this kernel has no transparent huge pages", facts={"mode": None}
        )
    found = re.search(r"\[(\w+)\]", file.read_text())
    mode = found[1] if found else "unknown"
    if mode in ("always", "madvise"):
        return Check(name, "ok", mode, facts={"mode": mode})
    return Check(name, "note", mode, _ADVICE[name], {"mode": mode})


def _memory(name: str) -> Check:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    detail = f"{available / 2**30:.1f} GiB available of {total / 2**30:.1f} GiB"
    return Check(name, "ok", detail, facts={"total": total, "available": available})


def _packages(name: str) -> Check:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        advice = f"pip install {' '.join(missing)}"
        return Check(name, "problem", f"missing: {', '.join(missing)}", advice, versions)
    detail = ", ".join(f"{package} {version}" for package, version in versions.items())
    return Check(name, "ok", detail, facts=versions)


def _bundled_model(name: str) -> Check:
    folder = importlib.resources.files("moecore").joinpath("bundled")
    missing = [file for file in _BUNDLED_FILES if not folder.joinpath(file).is_file()]
    facts = {"folder": str(folder), "missing": missing}
    if missing:
        detail = f"{folder} lacks {', '.join(missing)}"
        return Check(name, "problem", detail, _ADVICE[name], facts)
    return Check(name, "ok", str(folder), facts=facts)


_CHECKS: dict[str, Callable[[str], Check]] = {
    "torch": _torch,
    "build": _build,
    "instruction set": _instruction_set,
    "threads": _threads,
    "OpenMP": _openmp,
    "GPUs": _gpus,
    "NCCL": _nccl,
    "expert parallelism": _ranks,
    "huge pages": _huge_pages,
    "memory": _memory,
    "packages": _packages,
    "bundled model": _bundled_model,
}

_ADVICE = {
    "torch": "pip install 'torch>=2.10'",
    "build": "install moecore again: pip install --force-reinstall --no-deps moecore",
    "instruction set": (
        "prompts are computed faster with AMX: see that the kernel (5.16 or newer), the virtual"
        " machine and the sandbox allow it, and that moecore is used before threads get small"
        " signal stacks"
    ),
    "OpenMP": "two pools of threads wait for each other: import torch before the other library",
    "GPUs": "build where nvcc is: pip install . --config-settings=cmake.define.MOECORE_CUDA=ON",
    "NCCL": "for several GPUs: pip install nvidia-nccl-cu13 (or -cu12, as torch's CUDA)",
    "huge pages": (
        "weights are read faster from huge pages:"
        " echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    ),
    "bundled model": "install moecore from a wheel or a whole source tree, or always give --model",
}


def _build_info() -> dict[str, Any]:
    import moecore

    return moecore.build_info()


def _usable_cpus() -> float:
    """Processors of this process: its affinity, and the quota of its control group."""
    usable = float(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            usable = min(usable, int(limit) / int(period))
    return usable


def _mapped(pattern: str) -> list[str]:
    """Files mapped into this process whose name matches."""
    paths = {
        line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()
    }
    return sorted(path for path in paths if re.search(rf"/{pattern}", path))


def _nccl_of_wheels() -> list[str]:
    """libnccl.so.2 of nvidia-nccl-cu12 or nvidia-nccl-cu13: both install it at the same place."""
    for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found = [str(file.locate()) for file in files if file.name == "libnccl.so.2"]
        if found:
            return found
    return []
