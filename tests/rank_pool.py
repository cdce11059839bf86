"""Processes that serve as ranks of one group after another.

Run as a program, it becomes these processes: torch is imported once, before they part.
"""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict

from moecore.expert_parallel.channel import Channel, ChannelLost
from moecore.expert_parallel.members import Member
from moecore.expert_parallel.worker import Worker

_PATIENCE = 60.0


class RankPool:
    """Stands for members.start_processes."""

    def __init__(self, num_processes, address):
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(address)
        self._server.listen(64)
        self._server.settimeout(_PATIENCE)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._processes = subprocess.Popen(
            [sys.executable, __file__, address, str(num_processes)], env=environment
        )

    def start(self, options, patience, num_threads):
        members = {}
        for rank in range(1, len(options)):
            channel = Channel(self._server.accept()[0], patience)
            channel.send(
                "options",
                options=asdict(options[rank]),
                rank=rank,
                size=len(options),
                patience=patience,
            )
            members[rank] = Member(channel)
        return members

    def close(self):
        self._server.close()
        assert self._processes.wait(timeout=_PATIENCE) == 0


def serve(address):
    while True:
        connection = socket.socket(socket.AF_UNIX)
        with suppress(OSError, ChannelLost):
            connection.connect(address)
            worker = Worker(Channel(connection, _PATIENCE), on_orphaned=lambda: None)
            worker.serve(*worker.wait_for_options())
            continue
        return


if __name__ == "__main__":
    for _ in range(int(sys.argv[2])):
        if os.fork() == 0:
            serve(sys.argv[1])
            os._exit(0)
    with suppress(ChildProcessError):
        while True:
            os.wait()
