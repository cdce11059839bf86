"""Make a group of ranks: start or find them, agree, load, and give rank 0 its engine."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch

from moecore.assembly import Assembly, EngineOptions
from moecore.expert_parallel import agreement
from moecore.expert_parallel.channel import ChannelLost, Message
from moecore.expert_parallel.engine import ExpertParallelEngine
from moecore.expert_parallel.environment import Launch, launch_from_environment
from moecore.expert_parallel.group import (
    Group,
    are_on_one_machine,
    cache_shares,
    thread_shares,
)
from moecore.expert_parallel.members import Member, start_processes, start_threads
from moecore.expert_parallel.options import GroupOptions
from moecore.expert_parallel.rank import Rank, device_of_rank, open_transport, wanted_transport
from moecore.expert_parallel.worker import Worker, segment_of
from moecore.model_runner import BLOCK_SIZE, CachePlan
from moecore.target import choose_device
from moecore.transport import Transport

_START_SECONDS = 120.0  # for a process to import torch and read the model's description
_MEETING, _LOADING = "while the ranks met", "while the ranks loaded the model"
_is_used_up = False  # whether this process's launch has had its group


class Started(NamedTuple):
    """What rank 0 has when all ranks are ready."""

    engine: ExpertParallelEngine
    assembly: Assembly
    cache: CachePlan


def start(options: EngineOptions, wanted: GroupOptions, *, progress: bool) -> Started:
    """Start the group, and return rank 0's part of it.

    In a process that a launcher started as another rank this does not return: it serves rank 0, and
    then raises SystemExit.

    Raises:
        ValueError: more ranks than experts, devices or launched processes, or ranks that differ.
        TransportError: a rank was lost.
        Exception: whatever a rank raised as it loaded; no process is left.
    """
    launch = launch_from_environment() if wanted.backend == "processes" else None
    device = _check_device(options, wanted)
    if launch is not None:
        _check_launch(launch, wanted)
        options = replace(options, device=str(device_of_rank(device, launch.local_rank)))
        if launch.rank > 0:
            _serve(launch, options, wanted)
        from moecore.expert_parallel.rendezvous import accept_ranks

        # First of all, so that the other ranks hear of whatever fails here.
        with _Start(wanted, accept_ranks(launch, wanted.timeout, _START_SECONDS)) as made:
            return made.start(_assemble(options, wanted), None, are_ours=False, progress=progress)
    return _start_ranks(options, wanted, device, progress)


def _start_ranks(
    options: EngineOptions, wanted: GroupOptions, device: torch.device, progress: bool
) -> Started:
    """Start the other ranks on this machine, and the group with them."""
    devices = [device] * wanted.size
    if wanted.backend == "processes":
        devices = [device_of_rank(device, rank) for rank in range(wanted.size)]
    assembly = _assemble(replace(options, device=str(devices[0])), wanted)
    options = replace(options, model=str(assembly.folder), revision=None)
    each = [replace(options, device=str(device)) for device in devices]
    if wanted.backend == "threads":
        transports = Transport.in_process(wanted.size, device=device, deadline=wanted.timeout)
        with _Start(wanted, start_threads(each, wanted.timeout, transports)) as made:
            return made.start(assembly, transports[0], are_ours=True, progress=progress)
    shares = thread_shares([agreement.place_of_rank(device)] * wanted.size, are_ours=True)
    with _Start(wanted, start_processes(each, wanted.timeout, shares)) as made:
        return made.start(assembly, None, are_ours=True, progress=progress)


def _assemble(options: EngineOptions, wanted: GroupOptions) -> Assembly:
    assembly = Assembly(options)
    experts = assembly.config.moe.num_experts
    if wanted.size > experts:
        raise ValueError(
            f"LLM: expert_parallel_size must be at most the model's number of experts ({experts}), "
            f"got {wanted.size}"
        )
    return assembly


class _Start:
    """Brings all ranks from their first message to being ready; if it fails, they are ended."""

    def __init__(self, wanted: GroupOptions, members: Mapping[int, Member]) -> None:
        self._wanted = wanted
        self._group = Group(members, wanted.timeout)
        self._rank: Rank | None = None
        self._segment: Path | None = None

    def __enter__(self) -> _Start:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        self._group.close(f"rank 0 has ended the group: {type(error).__name__}: {error}")
        if self._rank is not None:
            self._rank.close()
        if self._segment is not None:
            self._segment.unlink(missing_ok=True)

    def start(
        self, assembly: Assembly, transport: Transport | None, *, are_ours: bool, progress: bool
    ) -> Started:
        """Agree, meet, load and start.

        Args:
            assembly: rank 0's.
            transport: rank 0's, if it has one already: the ranks are threads then.
            are_ours: whether moecore started the ranks.
            progress: show a bar.
        """
        group = self._group
        places = self._agree(assembly)
        shares = thread_shares(places, are_ours)
        if transport is None:
            self._rank = rank = self._meet(assembly, places, shares)
        else:
            self._rank = rank = self._meet_threads(assembly, transport, shares)
        group.attach(rank.transport)
        cache = rank.load(progress=progress, check=lambda: group.check(_LOADING))
        loaded = [group.receive(other, "loaded", _LOADING) for other in group.ranks]
        cache = self._share_memory(assembly, cache, loaded, cache_shares(places))
        for other in group.ranks:
            group.send(other, "start", "while it started", **asdict(cache))
        return Started(ExpertParallelEngine(rank, rank.start(cache), group), assembly, cache)

    def _agree(self, assembly: Assembly) -> list[Mapping[str, Any]]:
        """Compare what the ranks are about to run; returns the place of each."""
        facts = agreement.facts_of(assembly, self._wanted.size)
        places: list[Mapping[str, Any]] = [agreement.place_of_rank(assembly.device)]
        for other in self._group.ranks:
            hello = self._group.receive(other, "hello", "while it started", _START_SECONDS)
            difference = agreement.disagreement(facts, hello["facts"], other)
            if difference is not None:
                raise ValueError(difference)
            places.append(hello["place"])
        return places

    def _meet(self, assembly: Assembly, places: list[Mapping[str, Any]], shares: list[int]) -> Rank:
        """Open a transport between processes, each with its threads; returns rank 0's part."""
        plan: dict[str, Any] = {"hosts": None, "unique_id": None}
        if are_on_one_machine(places):
            plan["hosts"] = f"{os.getpid()}-{secrets.token_hex(8)}"
        is_one_machine, size = plan["hosts"] is not None, self._wanted.size
        if assembly.device.type == "cuda" and wanted_transport(is_one_machine, size) == "nccl":
            plan["unique_id"] = Transport.nccl_unique_id().hex()
        self._segment = segment_of(plan["hosts"])
        for other in self._group.ranks:
            self._group.send(other, "open", _MEETING, **plan, threads=shares[other])
        patience = self._wanted.timeout
        return Rank(assembly, open_transport(plan, 0, size, assembly.device, patience), shares[0])

    def _meet_threads(self, assembly: Assembly, transport: Transport, shares: list[int]) -> Rank:
        """The same where the transport is there, and threads are the process's."""
        rank = Rank(assembly, transport, shares[0])
        for other in self._group.ranks:
            self._group.send(other, "open", _MEETING, threads=None)
        return rank

    def _share_memory(
        self, assembly: Assembly, mine: CachePlan, others: list[Message], shares: int
    ) -> CachePlan:
        """The cache that every rank can have."""
        num_blocks = min([mine.num_blocks, *(one["num_blocks"] for one in others)])
        if assembly.options.kv_cache_memory is None:
            num_blocks = max(1, num_blocks // shares)
        longest = min([mine.max_model_len, *(one["max_model_len"] for one in others)])
        return CachePlan(num_blocks, min(longest, num_blocks * BLOCK_SIZE))


def _check_launch(launch: Launch, wanted: GroupOptions) -> None:
    global _is_used_up
    if launch.size != wanted.size:
        raise ValueError(
            "LLM: expert_parallel_size must be 1 or the number of processes that the launcher "
            f"started ({launch.size}), got {wanted.size}"
        )
    if _is_used_up:
        raise RuntimeError(
            "LLM: a launched group of processes serves one expert-parallel model, got a second: "
            "the other ranks have ended with the first"
        )
    _is_used_up = True


def _check_device(options: EngineOptions, wanted: GroupOptions) -> torch.device:
    """The device of LLM's argument; on GPUs, ranks that are processes choose among all."""
    device = choose_device(options.device)
    if wanted.backend == "processes" and options.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            "LLM: device must be 'auto', 'cpu' or 'cuda' with expert_parallel_size > 1 (each rank "
            f"takes the GPU of its number, CUDA_VISIBLE_DEVICES says which), got {options.device!r}"
        )
    return device


def _serve(launch: Launch, options: EngineOptions, wanted: GroupOptions) -> NoReturn:
    """Be another rank than 0 until rank 0 closes the group; ends this process."""
    from moecore.expert_parallel.rendezvous import connect_to_rank_0

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if is_main:  # Ctrl-C reaches every rank: rank 0 decides what becomes of it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        channel = connect_to_rank_0(launch, wanted.timeout, _START_SECONDS)
        Worker(channel, on_orphaned=lambda: None).serve(
            options, launch.rank, launch.size, wanted.timeout
        )
    except ChannelLost:
        raise RuntimeError(
            f"LLM: rank 0 is gone, so rank {launch.rank} ends; what rank 0 printed may say why"
        ) from None
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
    raise SystemExit(0)
