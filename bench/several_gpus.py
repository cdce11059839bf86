"""Every measurement of expert parallelism on the ranks of one host, in one command.

    python bench/several_gpus.py [--out FOLDER] [--device cuda|cpu] [--sizes 2,4,8]
        [--stages links,moves,layer,exposed,bits,model] [--bench FOLDER] [--smoke]
        [--transport nccl|peer]

Runs on any number of GPUs (a process a GPU), on one GPU, and on the CPU (processes over
shared memory), there with smaller sizes. Stages:

    links    NCCL's all-to-all by size (gloo's on the CPU), and moecore's own measure of its link
    moves    dispatch and combine alone: 128 and 4096 tokens a rank, logical GB/s
    layer    the layer on ranks, against tensor parallelism and all-gather + reduce-scatter
    exposed  what of the layer's communication shows, with and without overlap: the binary
             bench_expert_parallel, from --bench
    bits     every schedule against one rank with all experts; graphs; a rank killed in mid-run
    model    whole models with random weights generate on 1 .. N ranks

Writes FOLDER/machine.json, FOLDER/STAGE.md with a table each, and FOLDER/STAGE.log. NVLink
multicast is left off (NCCL_NVLS_ENABLE=0). Ends with 1 if a stage failed; the others run
nonetheless.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import uuid
from pathlib import Path

import torch

import moecore

HERE = Path(__file__).resolve().parent
STAGES = ("links", "moves", "layer", "exposed", "bits", "model")
SECONDS = 600  # of one stage on one number of ranks


def command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    except OSError:
        return ""


def machine(device: str) -> dict[str, object]:
    """What a figure must be read with."""
    facts: dict[str, object] = {
        "device": device,
        "moecore": moecore.__version__,
        "commit": os.environ.get("MOECORE_COMMIT") or command_output("git", "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        query = "--query-gpu=name,driver_version"
        facts["cards"] = command_output("nvidia-smi", query, "--format=csv,noheader").splitlines()
        facts["topology"] = command_output("nvidia-smi", "topo", "-m")
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def group_sizes(options: argparse.Namespace) -> list[int]:
    """Numbers of ranks: what is wanted, as far as there are GPUs; one on a single GPU."""
    if options.device == "cpu":
        return options.sizes or [2]
    count = torch.cuda.device_count()
    return [n for n in options.sizes or [2, 4, 8] if n <= count] or [1]


def run_ranks(stage: str, size: int, options: argparse.Namespace, log: Path) -> str | None:
    """Runs a stage's ranks; returns what went wrong. Rank 0 appends to the stage's table."""
    name = uuid.uuid4().hex
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "PYTHONUNBUFFERED": "1"}
    if options.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // size))
    base = [sys.executable, str(HERE / "several_gpus_rank.py"), stage, options.device, str(size)]
    tail = [name, str(options.out), "smoke" if options.smoke else "full"]
    with log.open("a") as file:
        ranks = [
            subprocess.Popen([*base, str(r), *tail], stdout=file, stderr=file, env=environment)
            for r in range(size)
        ]
        try:
            codes = [rank.wait(timeout=SECONDS) for rank in ranks]
        except subprocess.TimeoutExpired:
            for rank in ranks:
                rank.kill()
            return f"no end within {SECONDS} s"
    return None if not any(codes) else f"exit codes {codes}"


def run_command(command: list[str], output: Path) -> str | None:
    """Runs a program whose output is the stage's result; returns what went wrong."""
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "PYTHONUNBUFFERED": "1"}
    with output.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            code = subprocess.run(
                command, stdout=file, stderr=file, env=environment, timeout=SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return f"no end within {SECONDS} s"
        except OSError as error:
            return str(error)
    return None if code == 0 else f"exit code {code}"


def run_exposed(size: int, options: argparse.Namespace) -> str | None:
    """The binary that compares a layer with its echo."""
    if options.bench is None:
        return "--bench must name the folder of bench_expert_parallel"
    shapes = {"qwen3-30b-a3b": "128,4096,8192", "mixtral-8x7b/2": "128,4096"}
    transport = options.transport
    if options.device == "cpu":
        shapes, transport = {"small-many": "32" if options.smoke else "1,32,512"}, "shm"
    for shape, tokens in shapes.items():
        command = [str(options.bench / "bench_expert_parallel"), "--ranks", str(size)]
        command += ["--transport", transport, "--shape", shape, "--tokens", tokens]
        wrong = run_command([*command, "--repeats", "9"], options.out / "exposed.md")
        if wrong is not None:
            return f"{shape}: {wrong}"
    return None


def run_bits(size: int, options: argparse.Namespace) -> str | None:
    """The tests that hold bits, graphs and faults."""
    tests, log = HERE.parent / "tests", options.out / "bits.log"
    if options.device == "cuda":
        return run_command([sys.executable, str(tests / "gpu_expert_parallel.py")], log)
    files = ["test_expert_parallel.py", "test_expert_parallel_faults.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return run_command([*command, *(str(tests / file) for file in files)], log)


def run_stage(stage: str, size: int, options: argparse.Namespace) -> str | None:
    if stage == "exposed":
        return run_exposed(size, options)
    if stage == "bits":
        return run_bits(size, options)
    if stage == "model":
        log = options.out / "model.log"
        command = [sys.executable, str(HERE / "several_gpus_model.py"), options.device, str(size)]
        return run_command([*command, str(options.out), "smoke" if options.smoke else "full"], log)
    return run_ranks(stage, size, options, options.out / f"{stage}.log")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, default=Path("several-gpus"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES))
    parser.add_argument("--bench", type=Path)
    parser.add_argument("--transport", choices=("nccl", "peer"), default="nccl", help="of GPUs")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes: does it run?")
    options = parser.parse_args()
    os.environ["MOECORE_TRANSPORT"] = options.transport
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"--stages must be among {','.join(STAGES)}, got {','.join(sorted(unknown))}")
    if options.sizes is not None and min(options.sizes) < 1:
        parser.error(f"--sizes must be >= 1, got {options.sizes}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in [*options.out.glob("*.md"), *options.out.glob("*.log")]:
        old.unlink()
    facts = machine(options.device)
    (options.out / "machine.json").write_text(json.dumps(facts, indent=2) + "\n")
    failed = False
    for stage in options.stages:
        # The tests choose the number of ranks themselves.
        sizes = group_sizes(options)[-1:] if stage == "bits" else group_sizes(options)
        for size in sizes:
            wrong = run_stage(stage, size, options)
            failed = failed or wrong is not None
            print(f"{stage}, {size} ranks: {wrong or 'done'}", flush=True)
    for table in sorted(options.out.glob("*.md")):
        print(f"\n## {table.stem}\n\n{table.read_text()}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
