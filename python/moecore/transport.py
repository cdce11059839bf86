"""Transport: what the ranks of an expert-parallel group exchange bytes with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moecore import _core


class Transport:
    """One rank's end of a group of ranks.

    Made by `in_process` (ranks are threads), `shm` (processes of one host) or `loopback` (a group
    of one). All ranks make the same calls in the same order. A wait ends by the deadline: a rank
    that is dead, stopped or late becomes a TransportError on every other rank, whose message names
    it, the phase and the remedy. After an error the group is lost: every rank needs a new
    transport.

    Attributes:
        native: the transport as the core takes it.

    Example:
        >>> transports = moecore.Transport.in_process(2)  # give one to each of two threads
    """

    def __init__(self, native: _core.Transport, deadline: float) -> None:
        self.native = native
        self.deadline = deadline

    @classmethod
    def loopback(cls) -> Transport:
        """Make a group of one rank."""
        return cls(_core.Transport.loopback(), 30.0)

    @classmethod
    def in_process(
        cls, size: int, *, device: torch.device | str = "cpu", deadline: float = 30.0
    ) -> list[Transport]:
        """Make a group whose ranks are threads of this process: one transport for each.

        Args:
            size: number of ranks, in [1, 256].
            device: where their tensors are. On a GPU they are virtual ranks that share it.
            deadline: seconds without a sign of a peer after which a wait raises.

        Raises:
            ValueError: an argument is out of range.
        """
        natives = _core.Transport.in_process(size, _cuda_index(device))
        return [cls(native, deadline) for native in natives]

    @classmethod
    def shm(
        cls,
        name: str,
        rank: int,
        size: int,
        *,
        deadline: float = 30.0,
        connect_deadline: float = 120.0,
        ring_bytes: int = 0,
    ) -> Transport:
        """Join a group whose ranks are processes of one host, over POSIX shared memory.

        Returns when all ranks are there. The segment has no name from then on: no kind of death
        leaves it behind. One that a crashed run left is replaced.

        Args:
            name: of the run, the same on every rank: letters, digits, `_`, `.`, `-`.
            rank: of this process, in [0, size).
            size: number of ranks, in [1, 256].
            deadline: seconds without a sign of a peer after which a wait raises.
            connect_deadline: seconds until every rank must be there.
            ring_bytes: of shared memory for each ordered pair of ranks, a power of two
                (default: chosen by size).

        Raises:
            ValueError: an argument is out of range, the name belongs to a running group, or
                /dev/shm has too little memory.
            TransportError: a rank is missing or dead; the message names it.
        """
        return cls(_core.Transport.shm(name, rank, size, connect_deadline, ring_bytes), deadline)

    @staticmethod
    def nccl_unique_id() -> bytes:
        """Make the name of an NCCL group, for one rank to give to all.

        Raises:
            UnsupportedError: no NCCL was found; the message lists where it was looked for.
        """
        return _core.Transport.nccl_unique_id(_nccl_paths())

    @classmethod
    def nccl(
        cls,
        unique_id: bytes,
        rank: int,
        size: int,
        *,
        device: torch.device | str | None = None,
        hosts: Transport | None = None,
        deadline: float = 30.0,
        connect_deadline: float = 120.0,
    ) -> Transport:
        """Join a group of GPUs over NCCL, loaded at first use.

        NCCL is what MOECORE_NCCL names, else the copy that torch has loaded, else the nvidia-nccl
        wheel's, else the system's; 2.18 or newer.

        Args:
            unique_id: of one rank's `nccl_unique_id()`.
            rank: of this process, in [0, size).
            size: number of ranks.
            device: this rank's GPU (default: the current one).
            hosts: an `shm` transport of the same ranks, which this one takes over, if all are on
                one machine: it names a dead rank at once.
            deadline: seconds without a sign of a peer after which a wait raises.
            connect_deadline: seconds until every rank must be there.

        Raises:
            ValueError: an argument is out of range.
            UnsupportedError: no NCCL was found; the message lists where it was looked for.
            TransportError: a rank is missing.
        """
        index = torch.cuda.current_device() if device is None else _cuda_index(device)
        if index is None:
            raise ValueError(f"Transport: device must be a GPU, got {device}")
        native = _core.Transport.nccl(
            unique_id,
            rank,
            size,
            index,
            connect_deadline,
            _nccl_paths(),
            None if hosts is None else hosts.native,
        )
        return cls(native, deadline)

    @classmethod
    def peer(
        cls,
        hosts: Transport,
        *,
        device: torch.device | str | None = None,
        deadline: float = 30.0,
    ) -> Transport:
        """Join a group of GPUs of one machine that write to each other's memory.

        Layers write tokens and results straight to where they belong. Ranks that are processes with
        a GPU each wait for each other on their GPUs, and their layers can be captured in CUDA
        graphs (`can_capture`). Returns when every rank is there.

        Args:
            hosts: an `shm` or `in_process` transport on the CPU of the same ranks, which this one
                takes over.
            device: this rank's GPU (default: the current one); several ranks may share one.
            deadline: seconds without a sign of a peer after which a wait raises.

        Raises:
            ValueError: an argument is out of range.
            UnsupportedError: a GPU does not reach another's memory; every rank says so.
            TransportError: a rank is missing.
        """
        index = torch.cuda.current_device() if device is None else _cuda_index(device)
        if index is None:
            raise ValueError(f"Transport: device must be a GPU, got {device}")
        return cls(_core.Transport.peer(hosts.native, index), deadline)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.native.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.native.size

    @property
    def kind(self) -> str:
        """ "loopback", "in_process", "shm", "nccl" or "peer"."""
        return self.native.kind

    @property
    def deadline(self) -> float:
        """Seconds without a sign of a peer after which a wait raises."""
        return self.native.deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self.native.deadline = seconds

    def barrier(self, phase: str = "barrier") -> None:
        """Return when every rank has called it; `phase` names it in errors."""
        self.native.barrier(phase)

    def all_gather(self, tensor: Tensor, phase: str = "all_gather") -> Tensor:
        """Give every rank's tensor to every rank.

        Args:
            tensor: on the CPU, of the same shape and dtype on every rank.
            phase: names the call in errors.

        Returns:
            [size, *tensor.shape], by rank.
        """
        if tensor.device.type != "cpu":
            raise ValueError(f"Transport: tensor must be on cpu, got {tensor.device}")
        result = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype)
        mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self.native.all_gather(phase, mine.numpy(), result.reshape(-1).view(torch.uint8).numpy())
        return result

    def synchronize(self, phase: str = "synchronize") -> None:
        """Wait for what the current stream of this rank's GPU holds, until the deadline.

        Unlike torch's waits, this one ends if a peer never sends its part. On the CPU there is
        nothing to wait for.

        Raises:
            TransportError: a peer is dead, stopped or late, or the group has been aborted.
        """
        device = self.native.cuda_device
        stream = 0 if device is None else torch.cuda.current_stream(device).cuda_stream
        self.native.synchronize(phase, stream)

    @property
    def can_capture(self) -> bool:
        """Whether layers over it can be captured in a CUDA graph, in fixed shapes.

        A wait keeps the deadline that it was captured with.
        """
        return self.native.can_capture

    @contextmanager
    def fixed_tokens(self, count: int) -> Iterator[None]:
        """Give every layer within the context `fixed_tokens=count`, whatever it was made with.

        For CUDA graphs of whole models, one for each number of tokens. Every rank enters and
        leaves it between the same calls of layers.

        Args:
            count: at least the tokens of any rank.
        """
        self.native.fix_tokens(count)
        try:
            yield
        finally:
            self.native.fix_tokens(0)

    def measure(self) -> dict[str, float]:
        """Measure this link, which decides how layers with schedule="auto" work. Collective.

        Returns:
            The slowest rank's `link_gbps` and `link_latency_us`, the same on every rank.
        """
        self.native.measure()
        return self.native.figures

    @property
    def last_choice(self) -> str:
        """How the last layer's rows travelled, and why."""
        return self.native.last_choice

    def start_trace(self) -> None:
        """Record the phases of layers from now on, and forget those before."""
        self.native.start_trace()

    def write_trace(self, path: str | Path) -> None:
        """Write this rank's phases for chrome://tracing or ui.perfetto.dev."""
        Path(path).write_text(f'{{"traceEvents":[\n{self.native.trace_events()}\n]}}\n')

    def abort(self, reason: str) -> None:
        """Make every rank's current and next call raise, naming this rank and `reason`."""
        self.native.abort(reason)

    def close(self) -> None:
        """Leave the group and free its memory. Peers that still wait for this rank raise."""
        self.native.close()

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _cuda_index(device: torch.device | str) -> int | None:
    """Say which GPU `device` is; None for the CPU."""
    device = torch.device(device)
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _nccl_paths() -> list[str]:
    """List where the nvidia-nccl wheels put their library."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return [str(Path(folder) / "nccl/lib/libnccl.so.2") for folder in folders]


def expert_range(num_experts: int, rank: int, size: int) -> range:
    """Name the experts that a rank owns: contiguous, and one more or less than other ranks.

    Args:
        num_experts: E.
        rank: in [0, size).
        size: number of ranks, at most num_experts.

    Raises:
        ValueError: an argument is out of range.
    """
    first, count = _core.expert_range(num_experts, rank, size)
    return range(first, first + count)
