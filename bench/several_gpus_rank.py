"""One rank of the stages links, moves and layer of several_gpus.py, which starts it."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import moecore
from moecore import ops


class Shape(NamedTuple):
    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int


QWEN3 = Shape("qwen3-30b-a3b", 2048, 768, 128, 8)
MIXTRAL = Shape("mixtral-8x7b", 4096, 14336, 8, 2)
# What moves, without what is computed: the experts' inner width is as small as it may be.
DEEPSEEK_MOVES = Shape("7168, 8 of 256", 7168, 64, 256, 8)
QWEN3_MOVES = QWEN3._replace(inner=64)
SMALL = Shape("small", 256, 128, 16, 4)


class Rank:
    """This process's place: its device, its moecore transport and its torch process group."""

    def __init__(self, device: str, size: int, rank: int, name: str, out: Path, smoke: bool):
        self.size, self.rank, self.out, self.smoke = size, rank, out, smoke
        self.is_cuda = device == "cuda"
        self.device = torch.device("cuda", rank) if self.is_cuda else torch.device("cpu")
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        meeting = Path(tempfile.gettempdir()) / f"moecore-{name}"
        dist.init_process_group(
            "nccl" if self.is_cuda else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            device_id=self.device if self.is_cuda else None,
        )
        self.transport = self._connect(name)

    def _connect(self, name: str) -> moecore.Transport:
        hosts = moecore.Transport.shm(name, self.rank, self.size, connect_deadline=60)
        if not self.is_cuda:
            return hosts
        if os.environ.get("MOECORE_TRANSPORT") == "peer":
            return moecore.Transport.peer(hosts, device=self.device)
        unique = moecore.Transport.nccl_unique_id() if self.rank == 0 else bytes(128)
        ids = hosts.all_gather(torch.frombuffer(bytearray(unique), dtype=torch.uint8))
        return moecore.Transport.nccl(
            bytes(ids[0].tolist()), self.rank, self.size, device=self.device, hosts=hosts
        )

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def largest(self, value: float) -> float:
        return float(self.transport.all_gather(torch.tensor([value], dtype=torch.float64)).max())

    def micros(self, run: Callable[[], object], repeats: int = 15) -> float:
        """Median of calls that begin together; the slowest rank's."""
        times = []
        for i in range(repeats + 3):
            self.transport.barrier("bench")
            begin = time.perf_counter()
            run()
            self.synchronize()
            if i >= 3:
                times.append((time.perf_counter() - begin) * 1e6)
        return self.largest(statistics.median(times))

    def table(self, stage: str, columns: list[str]) -> None:
        """Begins a table, once for all numbers of ranks."""
        path = self.out / f"{stage}.md"
        if self.rank == 0 and not path.exists():
            path.write_text(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n")

    def row(self, stage: str, *cells: object) -> None:
        if self.rank == 0:
            with (self.out / f"{stage}.md").open("a") as file:
                file.write(f"| {' | '.join(map(str, cells))} |\n")


def links(rank: Rank) -> None:
    """NCCL's all-to-all by bytes for each rank; the last line is moecore's measure of its own."""
    rank.table("links", ["ranks", "what", "bytes to each rank", "us", "GB/s sent"])
    most = 1 << (18 if rank.smoke else 26 if rank.is_cuda else 22)
    bytes_each = 64
    while bytes_each <= most:
        send = torch.zeros(bytes_each * rank.size, dtype=torch.uint8, device=rank.device)
        received = torch.empty_like(send)

        def run(send: Tensor = send, received: Tensor = received) -> None:
            dist.all_to_all_single(received, send)

        us = rank.micros(run)
        sent = bytes_each * (rank.size - 1) / us * 1e-3
        backend = dist.get_backend()
        rank.row(
            "links", rank.size, f"{backend} all-to-all", bytes_each, f"{us:.1f}", f"{sent:.2f}"
        )
        bytes_each *= 16 if bytes_each < 1 << 16 else 4
    figures = rank.transport.measure()
    rank.row(
        "links",
        rank.size,
        f"moecore over {rank.transport.kind}",
        "1 to 8388608",
        f"{figures['link_latency_us']:.1f}",
        f"{figures['link_gbps']:.2f}",
    )


def random_weights(rank: Rank, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator(rank.device).manual_seed(seed)
    values = torch.empty(shape, dtype=torch.bfloat16, device=rank.device)
    return values.normal_(0.0, 0.02, generator=generator)


def experts(rank: Rank, shape: Shape, share: range) -> tuple[Tensor, Tensor]:
    """Experts `share`, the same values whoever holds them."""
    gate_up = [random_weights(rank, 2 * shape.inner, shape.hidden, seed=e) for e in share]
    down = [random_weights(rank, shape.hidden, shape.inner, seed=1000 + e) for e in share]
    return torch.stack(gate_up), torch.stack(down)


def tokens(rank: Rank, shape: Shape, count: int, owner: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(rank.device).manual_seed(owner)
    hidden = torch.randn(count, shape.hidden, device=rank.device, generator=generator)
    logits = torch.randn(count, shape.experts, device=rank.device, generator=generator)
    return hidden.to(torch.bfloat16), logits


def ranks_layer(
    rank: Rank, shape: Shape, weights: tuple[Tensor, Tensor], **how: object
) -> Callable:
    first = moecore.expert_range(shape.experts, rank.rank, rank.size).start
    return moecore.MoELayer(
        *weights,
        ops.RoutingConfig(top_k=shape.top_k),
        num_experts=shape.experts,
        first_expert=first,
        transport=rank.transport,
        **how,  # type: ignore[arg-type]
    )


def phase_micros(rank: Rank, repeats: int, run: Callable[[], object]) -> dict[str, float]:
    """Median of each phase's microseconds, the slowest rank's."""
    rank.transport.start_trace()
    for _ in range(repeats):
        rank.transport.barrier("bench")
        run()
    rank.synchronize()
    durations: dict[str, list[float]] = {}
    for event in json.loads(f"[{rank.transport.native.trace_events()}]"):
        if "dur" in event:
            durations.setdefault(event["name"].rstrip(" 0123456789"), []).append(event["dur"])
    return {name: rank.largest(statistics.median(d)) for name, d in sorted(durations.items())}


def moves(rank: Rank) -> None:
    """Dispatch and return of the all-to-all; logical bytes count a rank's own share, too.

    Where ranks write to each other's memory, results cross in the experts' second GEMM: then
    "return" is the experts' time, both GEMMs, and the wait for the others.
    """
    columns = ["ranks", "shape", "tokens a rank", "dispatch us", "GB/s", "return us", "GB/s"]
    rank.table("moves", [*columns, "combine us", "whole layer us", "in a graph us"])
    shapes = [SMALL] if not rank.is_cuda or rank.smoke else [DEEPSEEK_MOVES, QWEN3_MOVES]
    for shape in shapes:
        share = moecore.expert_range(shape.experts, rank.rank, rank.size)
        weights = experts(rank, shape, range(share.start, share.stop))
        for count in [128] if rank.smoke else [128, 4096]:
            move(rank, shape, weights, *tokens(rank, shape, count, rank.rank))


def move(
    rank: Rank, shape: Shape, weights: tuple[Tensor, Tensor], hidden: Tensor, logits: Tensor
) -> None:
    layer = ranks_layer(rank, shape, weights, schedule="all_to_all", num_groups=1)
    count, out = len(hidden), torch.empty_like(hidden)

    def run() -> None:
        layer(hidden, logits, out=out)

    us = rank.micros(run)
    phases = phase_micros(rank, 9, run)
    ids = torch.topk(logits, shape.top_k).indices
    owners = [moecore.expert_range(shape.experts, r, rank.size) for r in range(rank.size)]
    copies = sum(int(((ids >= o.start) & (ids < o.stop)).any(dim=1).sum()) for o in owners)
    dispatch, back = phases["dispatch"], phases["return"]
    if rank.transport.kind == "peer":
        back += phases["experts"]
    row_kb = shape.hidden * 2e-3
    rank.row(
        "moves",
        rank.size,
        shape.name,
        count,
        f"{dispatch:.0f}",
        f"{copies * row_kb / dispatch:.1f}",
        f"{back:.0f}",
        f"{count * shape.top_k * row_kb / back:.1f}",
        f"{phases['combine']:.0f}",
        f"{us:.0f}",
        graph_micros(rank, shape, weights, hidden, logits),
    )


def graph_micros(
    rank: Rank, shape: Shape, weights: tuple[Tensor, Tensor], hidden: Tensor, logits: Tensor
) -> str:
    """A replay of the layer in fixed shapes, for few tokens on a GPU."""
    if rank.transport.kind != "nccl" or len(hidden) > 512:
        return "-"
    layer = ranks_layer(rank, shape, weights, schedule="all_gather", fixed_tokens=len(hidden))
    out, stream = torch.empty_like(hidden), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(hidden, logits, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        layer(hidden, logits, out=out)
    rank.transport.barrier("graph")
    replays = 20
    return f"{rank.micros(lambda: [graph.replay() for _ in range(replays)]) / replays:.1f}"


def layers(rank: Rank) -> None:
    """The layer by expert parallelism, tensor parallelism, and all-gather + reduce-scatter."""
    rank.table("layer", ["ranks", "shape", "tokens a rank", "how", "us", "bits of one rank"])
    shapes = [QWEN3, MIXTRAL] if rank.is_cuda and not rank.smoke else [SMALL]
    counts = [32] if rank.smoke else [128, 4096] if rank.is_cuda else [32, 512]
    for shape in shapes:
        whole = experts(rank, shape, range(shape.experts))
        share = moecore.expert_range(shape.experts, rank.rank, rank.size)
        local = tuple(w[share.start : share.stop] for w in whole)
        for count in counts:
            compare_layer(rank, shape, count, whole, local)


def compare_layer(
    rank: Rank,
    shape: Shape,
    count: int,
    whole: tuple[Tensor, Tensor],
    local: tuple[Tensor, ...],
) -> None:
    routing = ops.RoutingConfig(top_k=shape.top_k)
    hidden, logits = tokens(rank, shape, count, rank.rank)
    wanted = moecore.MoELayer(*whole, routing)(hidden, logits)
    rank.transport.measure()
    ways: dict[str, dict[str, object]] = {
        "a2a, 1 group": {"schedule": "all_to_all", "num_groups": 1},
        "a2a, 2 groups": {"schedule": "all_to_all", "num_groups": 2},
        "a2a, 4 groups": {"schedule": "all_to_all", "num_groups": 4},
        "all-gather": {"schedule": "all_gather", "fixed_tokens": count},
        "auto": {},
    }
    for name, how in ways.items():
        if name == "all-gather" and count * rank.size * shape.top_k * shape.hidden > 1 << 28:
            continue  # its buffers have a row for every slot of every rank
        ranks = ranks_layer(rank, shape, local, **how)
        out = torch.empty_like(hidden)
        us = rank.micros(lambda ranks=ranks, out=out: ranks(hidden, logits, out=out))
        is_equal = rank.largest(float(not torch.equal(out, wanted))) == 0.0
        label = f"{name} ({rank.transport.last_choice.split(':')[0]})" if name == "auto" else name
        rank.row(
            "layer",
            rank.size,
            shape.name,
            count,
            f"EP {label}",
            f"{us:.0f}",
            "yes" if is_equal else "NO",
        )

    everyone = [tokens(rank, shape, count, r) for r in range(rank.size)]
    all_hidden, all_logits = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    slice_ = split(shape.inner, rank)
    rows = torch.cat([slice_, slice_ + shape.inner])
    sliced = whole[0][:, rows].contiguous(), whole[1][:, :, slice_].contiguous()
    tensor_parallel = moecore.MoELayer(*sliced, routing)
    partial = torch.empty_like(all_hidden)

    def run_tensor_parallel() -> None:
        tensor_parallel(all_hidden, all_logits, out=partial)
        dist.all_reduce(partial)

    us = rank.micros(run_tensor_parallel)
    rank.row("layer", rank.size, shape.name, count, "TP, all-reduce", f"{us:.0f}", "-")

    own_part = moecore.MoELayer(
        *local,
        routing,
        num_experts=shape.experts,
        first_expert=moecore.expert_range(shape.experts, rank.rank, rank.size).start,
    )
    out = torch.empty_like(hidden)

    def run_gather_scatter() -> None:
        dist.all_gather_into_tensor(all_hidden, hidden)
        dist.all_gather_into_tensor(all_logits, logits)
        own_part(all_hidden, all_logits, out=partial)
        if rank.is_cuda:
            dist.reduce_scatter_tensor(out, partial)
        else:  # gloo has no reduce-scatter
            dist.all_reduce(partial)
            out.copy_(partial.view(rank.size, count, -1)[rank.rank])

    us = rank.micros(run_gather_scatter)
    error = float((out.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
    label = "AG + RS" if rank.is_cuda else "AG + all-reduce"
    rank.row(
        "layer",
        rank.size,
        shape.name,
        count,
        label,
        f"{us:.0f}",
        f"no: {rank.largest(error):.1e} away",
    )


def split(inner: int, rank: Rank) -> Tensor:
    """This rank's features of the experts' inner layer."""
    share = moecore.expert_range(inner, rank.rank, rank.size)
    return torch.arange(share.start, share.stop, device=rank.device)


def main() -> None:
    stage, device, size, number, name, out, amount = sys.argv[1:]
    rank = Rank(device, int(size), int(number), name, Path(out), amount == "smoke")
    try:
        {"links": links, "moves": moves, "layer": layers}[stage](rank)
        rank.transport.barrier("end")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
