"""Ranks other than 0, as rank 0 starts, sees and ends them: processes, threads, or a launcher's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from moecore.assembly import EngineOptions
from moecore.expert_parallel.channel import Channel, ChannelLost
from moecore.expert_parallel.worker import Refused, Worker
from moecore.transport import Transport

# With this process's own path: `-m` would put the current folder before it.
_PROGRAM = [
    "-c",
    "import sys; sys.path[:] = sys.argv[2:]\n"
    "from moecore.expert_parallel.worker import main; main(int(sys.argv[1]))",
]


class Member:
    """A rank that a launcher started: rank 0 can talk to it, and no more."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def fate(self) -> str:
        """What became of a rank whose channel has ended."""
        return "has ended, or its connection has"

    def is_stopped(self) -> bool:
        """Whether it is known to be stopped, as by SIGSTOP."""
        return False

    def wait(self, seconds: float) -> bool:
        """Wait until it is gone; returns whether it is."""
        return True

    def kill(self) -> None:
        """End it now, if that can be done."""


class ProcessMember(Member):
    """A process that this one started."""

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes]) -> None:
        super().__init__(channel)
        self.process = process

    def fate(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(timeout=2.0)
            if status == -signal.SIGKILL:
                return "was ended by SIGKILL (the system sends it when memory runs out)"
            if status < 0:
                return f"was ended by {signal.Signals(-status).name}"
            return f"has exited with status {status}"
        return "has closed its connection"

    def is_stopped(self) -> bool:
        with suppress(OSError):
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state in "Tt"
        return False

    def wait(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=max(0.0, seconds))
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class ThreadMember(Member):
    """A thread of this process."""

    def __init__(self, channel: Channel, thread: threading.Thread) -> None:
        super().__init__(channel)
        self.thread = thread

    def wait(self, seconds: float) -> bool:
        self.thread.join(timeout=max(0.0, seconds))
        return not self.thread.is_alive()


def start_processes(
    options: list[EngineOptions], patience: float, num_threads: list[int]
) -> dict[int, Member]:
    """Start the ranks 1 .. size - 1 as processes; `options` and `num_threads` are by rank."""
    size = len(options)
    members: dict[int, Member] = {}
    try:
        for rank in range(1, size):
            mine, theirs = socket.socketpair()
            with theirs:
                process = _start_process(theirs, num_threads[rank])
            channel = Channel(mine, patience)
            members[rank] = ProcessMember(channel, process)
            _send_options(channel, options[rank], rank, size, patience)
    except BaseException:
        end_members(members, patience=0.0)
        raise
    return members


def _start_process(connection: socket.socket, num_threads: int) -> subprocess.Popen[bytes]:
    """A new interpreter that finds the same modules; the user's program is not run again."""
    path = [os.path.abspath(entry) for entry in sys.path]
    return subprocess.Popen(
        [sys.executable, *_PROGRAM, str(connection.fileno()), *path],
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # what comes on stdout is rank 0's
    )


def start_threads(
    options: list[EngineOptions], patience: float, transports: list[Transport]
) -> dict[int, Member]:
    """Start the ranks 1 .. size - 1 as threads; `options` and `transports` are by rank."""
    size = len(options)
    members: dict[int, Member] = {}
    for rank in range(1, size):
        mine, theirs = socket.socketpair()
        worker = Worker(Channel(theirs, patience), on_orphaned=lambda: None)
        thread = threading.Thread(
            target=_serve_on_thread,
            args=(worker, transports[rank]),
            name=f"moecore-rank-{rank}",
            daemon=True,
        )
        thread.start()
        channel = Channel(mine, patience)
        members[rank] = ThreadMember(channel, thread)
        _send_options(channel, options[rank], rank, size, patience)
    return members


def _serve_on_thread(worker: Worker, transport: Transport) -> None:
    with suppress(Refused, ChannelLost, Exception):  # rank 0 has been told, and shows it
        worker.serve(*worker.wait_for_options(), transport)


def _send_options(
    channel: Channel, options: EngineOptions, rank: int, size: int, patience: float
) -> None:
    with suppress(ChannelLost):  # noticed when its answer is due
        channel.send("options", options=asdict(options), rank=rank, size=size, patience=patience)


def end_members(members: dict[int, Member], patience: float) -> None:
    """Wait until all are gone, and kill those that are not in `patience` seconds."""
    deadline = time.monotonic() + patience
    for member in members.values():
        if not member.wait(deadline - time.monotonic()):
            member.kill()
    for member in members.values():
        member.channel.close()
