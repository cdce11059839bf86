"""Make a group of ranks: start or find them, agree, load, and give rank 0 its engine."""

from __future__ import annotations

import base64
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
from moecore.expert_parallel.channel import ChannelLost
from moecore.expert_parallel.engine import ExpertParallelEngine
from moecore.expert_parallel.environment import Launch, launch_from_environment
from moecore.expert_parallel.group import Group, require_one_machine, thread_shares
from moecore.expert_parallel.members import Member, start_processes, start_threads
from moecore.expert_parallel.options import GroupOptions
from moecore.expert_parallel.rank import Rank, open_transport
from moecore.expert_parallel.worker import Worker, segment_of
from moecore.model_runner import CachePlan
from moecore.target import choose_device
from moecore.transport import Transport

_START_SECONDS = 120.0  # for a process to import torch and read the model's description
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
    if launch is not None:
        _check_launch(launch, wanted)
        options = replace(options, device=_device_of(options, wanted, launch.local_rank))
        if launch.rank > 0:
            _serve(launch, options, wanted)
    else:
        options = replace(options, device=_device_of(options, wanted, 0))
    assembly = Assembly(options)
    experts = assembly.config.moe.num_experts
    if wanted.size > experts:
        raise ValueError(
            f"LLM: expert_parallel_size must be at most the model's number of experts ({experts}), "
            f"got {wanted.size}"
        )
    transports: list[Transport] = []
    if wanted.backend == "threads":
        transports = Transport.in_process(wanted.size, deadline=wanted.timeout)
    with _Start(assembly, wanted, _members(assembly, wanted, launch, transports)) as made:
        return made.start(transports[0] if transports else None, launch is None, progress)


def _members(
    assembly: Assembly,
    wanted: GroupOptions,
    launch: Launch | None,
    transports: list[Transport],
) -> Mapping[int, Member]:
    """The ranks other than 0: started, or met."""
    if launch is not None:
        from moecore.expert_parallel.rendezvous import accept_ranks

        return accept_ranks(launch, wanted.timeout, _START_SECONDS)
    plain = replace(assembly.options, model=str(assembly.folder), revision=None)
    each = [
        replace(plain, device=_device_of(assembly.options, wanted, rank))
        for rank in range(wanted.size)
    ]
    if transports:
        return start_threads(each, wanted.timeout, transports)
    place = agreement.place_of_process()
    return start_processes(each, wanted.timeout, thread_shares([place] * wanted.size, True))


class _Start:
    """Brings all ranks from their first message to being ready; if it fails, they are ended."""

    def __init__(
        self, assembly: Assembly, wanted: GroupOptions, members: Mapping[int, Member]
    ) -> None:
        self._assembly = assembly
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

    def start(self, transport: Transport | None, are_ours: bool, progress: bool) -> Started:
        """Agree, meet, load and start; `transport` is rank 0's, if it has one already."""
        group = self._group
        places = self._agree()
        self._rank = rank = self._meet(places, are_ours, transport)
        group.attach(rank.transport)
        phase = "while the ranks loaded the model"
        cache = rank.load(progress=progress, check=lambda: group.check(phase))
        loaded = [group.receive(other, "loaded", phase) for other in group.ranks]
        cache = CachePlan(
            min([cache.num_blocks, *(one["num_blocks"] for one in loaded)]),
            min([cache.max_model_len, *(one["max_model_len"] for one in loaded)]),
        )
        for other in group.ranks:
            group.send(other, "start", "while it started", **asdict(cache))
        return Started(ExpertParallelEngine(rank, rank.start(cache), group), self._assembly, cache)

    def _agree(self) -> list[Mapping[str, Any]]:
        """Compare what the ranks are about to run; returns the place of each."""
        facts = agreement.facts_of(self._assembly, self._wanted.size)
        places: list[Mapping[str, Any]] = [agreement.place_of_process()]
        for other in self._group.ranks:
            hello = self._group.receive(other, "hello", "while it started", _START_SECONDS)
            difference = agreement.disagreement(facts, hello["facts"], other)
            if difference is not None:
                raise ValueError(difference)
            places.append(hello["place"])
        return places

    def _meet(
        self, places: list[Mapping[str, Any]], are_ours: bool, transport: Transport | None
    ) -> Rank:
        """Open the transport on every rank."""
        shares = thread_shares(places, are_ours)
        plan: dict[str, Any] = {"kind": "in_process"}
        if transport is None and self._assembly.device.type == "cpu":
            require_one_machine(places)
            plan = {"kind": "shm", "name": f"{os.getpid()}-{secrets.token_hex(8)}"}
            self._segment = segment_of(plan["name"])
        elif transport is None:
            unique_id = base64.b64encode(Transport.nccl_unique_id()).decode()
            plan = {"kind": "nccl", "unique_id": unique_id}
        phase = "while the ranks met"
        for other in self._group.ranks:
            self._group.send(other, "open", phase, **plan, threads=shares[other])
        if transport is None:
            size, device, patience = self._wanted.size, self._assembly.device, self._wanted.timeout
            transport = open_transport(plan, 0, size, device, patience)
        return Rank(self._assembly, transport, shares[0])


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


def _device_of(options: EngineOptions, wanted: GroupOptions, local_rank: int) -> str:
    """The device of the rank with that number on its machine."""
    device = choose_device(options.device)
    if device.type == "cpu" or wanted.backend == "threads":
        return str(device)
    if options.device not in ("auto", "cuda", "cuda:0"):
        raise ValueError(
            "LLM: device must be 'auto', 'cpu' or 'cuda' with expert_parallel_size > 1 (each rank "
            f"takes the GPU of its number; CUDA_VISIBLE_DEVICES chooses), got {options.device!r}"
        )
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            "LLM: expert_parallel_size must be at most the number of GPUs of a machine "
            f"({torch.cuda.device_count()}), or device='cpu', got {wanted.size}"
        )
    return f"cuda:{local_rank}"


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
