"""One rank of a group: its model on its transport. Rank 0 and the others alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moecore import _core
from moecore.assembly import Assembly
from moecore.batch import Batch
from moecore.engine import Engine
from moecore.model_runner import CachePlan, ModelRunner
from moecore.outputs import RequestOutput
from moecore.transport import Transport

_CONNECT_SECONDS = 30.0  # for ranks that are all there to meet


class GroupRunner:
    """A ModelRunner whose passes are those of the whole group.

    Attributes:
        num_passes: passes that went through.
    """

    def __init__(self, runner: ModelRunner, transport: Transport) -> None:
        self._runner = runner
        self._transport = transport
        self.block_size = runner.block_size
        self.num_blocks = runner.num_blocks
        self.vocab_size = runner.vocab_size
        self.max_model_len = runner.max_model_len
        self.num_passes = 0

    def run(self, batch: Batch) -> Tensor:
        logits = self._runner.run(batch, self._most_decodes(batch))
        self._end_pass()
        return logits

    def join(self) -> None:
        """Take part in a pass with no tokens of this rank's own."""
        self._runner.join(self._most_decodes(None))
        self._end_pass()

    def _most_decodes(self, batch: Batch | None) -> int:
        """Decodes of any rank in this pass, or -1 if it is no graph's: the same on every rank."""
        if not self._runner.has_graphs:
            return -1
        mine = 0 if batch is None else self._runner.num_decodes(batch)
        everyones = self._transport.all_gather(torch.tensor([mine]), "agree on a pass")
        return -1 if int(everyones.min()) < 0 else int(everyones.max())

    def _end_pass(self) -> None:
        # Whoever reads the logits would wait for a lost peer for ever; this wait has a deadline.
        self._transport.synchronize("end of a pass")
        self.num_passes += 1


class Rank:
    """A rank's model and engine.

    Args:
        assembly: the model, read and checked; `load` loads this rank's weights.
        transport: this rank's; closed with it.
        num_threads: of the core and of torch; None leaves them to another rank of this process.
    """

    def __init__(self, assembly: Assembly, transport: Transport, num_threads: int | None) -> None:
        self._assembly = assembly
        self.transport = transport
        if assembly.device.type == "cuda":
            torch.cuda.set_device(assembly.device)
        self._threads_before = None
        if num_threads is not None:
            self._threads_before = _core.num_threads(), torch.get_num_threads()
            _set_threads(num_threads, num_threads)
        self._runner: GroupRunner | None = None
        self._engine: Engine | None = None

    def load(self, *, progress: bool, check: Callable[[], object] | None = None) -> CachePlan:
        """Load the weights, until `check` raises; return the cache that would fit."""
        return self._assembly.load(transport=self.transport, progress=progress, check=check)

    def start(self, cache: CachePlan) -> Engine:
        """Make the engine, with the cache on which all ranks agree."""
        self._runner = GroupRunner(self._assembly.runner(cache, self.transport), self.transport)
        self._engine = self._assembly.engine(self._runner)
        return self._engine

    def run_pass(self, number: int) -> list[RequestOutput]:
        """Run the group's pass of that number, the first being 1, and return what it brought.

        If this rank fails before its part is through, so does every other: see `has_run`.
        """
        assert self._engine is not None
        assert self._runner is not None
        try:
            if self._engine.has_unfinished:
                return self._engine.step()
            self._runner.join()
            return []
        except BaseException as error:
            if not self.has_run(number):
                self.transport.abort(f"{type(error).__name__}: {error}")
            raise

    def has_run(self, number: int) -> bool:
        """Whether this rank's part in pass `number` is through, so that no other waits for it."""
        return self._runner is not None and self._runner.num_passes >= number

    def close(self) -> None:
        """Free the model, and give the threads back."""
        self._engine = self._runner = None
        self.transport.close()
        if self._threads_before is not None:
            _set_threads(*self._threads_before)


def _set_threads(core: int, torch_threads: int) -> None:
    """Choose the threads of this process: the core's, and torch's."""
    _core.set_num_threads(core)
    torch.set_num_threads(torch_threads)


def device_of_rank(device: torch.device, local_rank: int) -> torch.device:
    """The device of the rank with that number on its machine, each GPU being one rank's.

    Raises:
        ValueError: there are fewer GPUs.
    """
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":  # NCCL's own switch, from 2.30 on
        local_rank %= count
    if local_rank >= count:
        raise ValueError(
            f"LLM: expert_parallel_size must be at most the number of GPUs of a machine ({count}), "
            f"or the device 'cpu', got a rank {local_rank} of a machine"
        )
    return torch.device("cuda", local_rank)


def wanted_transport(is_one_machine: bool, size: int) -> str:
    """Return how GPUs meet.

    Returns:
        What MOECORE_TRANSPORT says; else "peer" for ranks of one machine whose GPUs reach each
        other's memory, and "nccl" for others.

    Raises:
        ValueError: it says anything else, or "peer" for ranks of several machines.
    """
    wanted = os.environ.get("MOECORE_TRANSPORT") or "auto"
    if wanted not in ("auto", "nccl", "peer"):
        raise ValueError(f"LLM: MOECORE_TRANSPORT must be auto, nccl or peer, got {wanted!r}")
    if wanted == "peer" and not is_one_machine:
        raise ValueError("LLM: MOECORE_TRANSPORT must be nccl between machines, got 'peer'")
    if wanted == "auto":
        wanted = "peer" if is_one_machine and _gpus_reach_each_other(size) else "nccl"
    return wanted


def _gpus_reach_each_other(size: int) -> bool:
    gpus = range(min(size, torch.cuda.device_count()))
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


def open_transport(
    plan: Mapping[str, Any], rank: int, size: int, device: torch.device, deadline: float
) -> Transport:
    """Join the transport that rank 0 has planned; returns when every rank has.

    Args:
        plan: "hosts" names a transport through shared memory, or is None between machines;
            "unique_id" names one through NCCL, or is None on the CPU and for peer memory.
        rank: this one.
        size: of the group.
        device: of this rank.
        deadline: of every wait from then on, in seconds.
    """
    connect = max(deadline, _CONNECT_SECONDS)
    hosts = None
    if plan["hosts"] is not None:
        hosts = Transport.shm(
            plan["hosts"], rank, size, deadline=deadline, connect_deadline=connect
        )
    if plan["unique_id"] is None:
        assert hosts is not None
        if device.type == "cpu":
            return hosts
        return Transport.peer(hosts, device=device, deadline=deadline)
    return Transport.nccl(
        bytes.fromhex(plan["unique_id"]),
        rank,
        size,
        device=device,
        hosts=hosts,
        deadline=deadline,
        connect_deadline=connect,
    )
