"""Loading of weights beside the rate at which the same bytes can be read, GB/s.

Rounds alternate between the roof and what stands under it, so that both see the same machine; all
of them write memory that has been touched before, from files in the page cache.

    read   the files into memory of their size, on as many threads: the roof of copies
    copy   load_weights into plain tensors
    pack   load_weights into PackedWeights, gate and up to one matrix, as experts are on the CPU
    touch  one more read into new memory: what the first use of a page costs

python bench/bench_loading.py [--folder DIR] [--megabytes N] [--threads N] [--cold]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

import moecore
from moecore.checkpoint import Checkpoint
from moecore.loading import Packing, Source, WeightSlot, load_weights

READ_BYTES = 8 << 20
SHAPES = {  # I, H of one expert
    "qwen3-30b-a3b": (768, 2048),
    "mixtral-8x7b": (14336, 4096),
}


def write_experts(folder: Path, count: int, inner: int, hidden: int) -> None:
    """Experts as checkpoints hold them, gate and up each by itself."""
    tensors = {
        f"experts.{expert:04d}.{part}": torch.full((inner, hidden), 1.0 + expert).bfloat16()
        for expert in range(count)
        for part in ("gate", "up")
    }
    save_file(tensors, folder / "model.safetensors")


def slots_of(
    count: int,
    inner: int,
    hidden: int,
    load: Callable[[int], Callable[..., None]],
    packed: moecore.PackedWeights | None = None,
) -> list[WeightSlot]:
    return [
        WeightSlot(
            (
                tuple(
                    Source(f"experts.{expert:04d}.{part}", (inner, hidden))
                    for part in ("gate", "up")
                ),
            ),
            load(expert),
            packing=None if packed is None else Packing(packed, expert),
        )
        for expert in range(count)
    ]


def read_into(path: Path, target: memoryview, num_threads: int) -> None:
    def read(begin: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            part = target[begin : begin + READ_BYTES]
            while part:
                part = part[file.readinto(part) :]

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, range(0, len(target), READ_BYTES)))


def evict(path: Path) -> None:
    """Drop the file's pages from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, folder: Path, args: argparse.Namespace) -> None:
    inner, hidden = SHAPES[name]
    count = max((args.megabytes << 20) // (4 * inner * hidden), 1)
    write_experts(folder, count, inner, hidden)
    path = folder / "model.safetensors"
    size = path.stat().st_size
    plain = torch.zeros(count, 2, inner, hidden, dtype=torch.bfloat16)
    packed = moecore.PackedWeights("bfloat16", count, 2 * inner, hidden, True)
    memory = torch.zeros(size, dtype=torch.uint8).numpy().data

    def copy_to(expert: int) -> Callable[..., None]:
        def load(gate: torch.Tensor, up: torch.Tensor) -> None:
            plain[expert, 0].copy_(gate)
            plain[expert, 1].copy_(up)

        return load

    def pack_to(expert: int) -> Callable[..., None]:
        return lambda gate, up: packed.pack_gated(expert, gate, up)

    def load(slots: list[WeightSlot]) -> None:
        checkpoint = Checkpoint.open(folder)
        load_weights(
            checkpoint, slots, dtype=torch.bfloat16, progress=False, num_threads=args.threads
        )

    copy = slots_of(count, inner, hidden, copy_to)
    pack = slots_of(count, inner, hidden, pack_to, packed)
    steps = {
        "read": lambda: read_into(path, memory, args.threads),
        "copy": lambda: load(copy),
        "pack": lambda: load(pack),
        "touch": lambda: read_into(
            path, torch.empty(size, dtype=torch.uint8).numpy().data, args.threads
        ),
    }
    rates: dict[str, list[float]] = {step: [] for step in steps}
    for _ in range(args.rounds + 1):  # the first round warms the memory, and is not counted
        for step, run in steps.items():
            if args.cold:
                evict(path)
            begin = time.perf_counter()
            run()
            rates[step].append(size / (time.perf_counter() - begin) / 1e9)
    want = torch.arange(1, count + 1).bfloat16().view(-1, 1, 1, 1)
    correct = bool((plain == want).all())
    medians = {step: statistics.median(values[1:]) for step, values in rates.items()}
    for step, rate in medians.items():
        low, high = min(rates[step][1:]), max(rates[step][1:])
        share = rate / medians["read"]
        print(
            f"{name:14} {count:5} {size / 1e6:8.0f} | {step:6} {rate:6.2f} {share:7.0%} "
            f" {low:.2f}-{high:.2f}  {'yes' if correct else 'NO'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where the files are written for a while")
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=min(moecore.num_threads(), 16))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="evict the files before each step")
    args = parser.parse_args()
    print(
        f"# {args.threads} threads, {'cold' if args.cold else 'page cache'}, {args.rounds} rounds"
    )
    print("model          experts     MB | step     GB/s  of read  range      correct")
    for name in SHAPES:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measure(name, Path(folder), args)


if __name__ == "__main__":
    main()
