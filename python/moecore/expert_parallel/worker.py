"""The life of a rank other than 0: load, then do what rank 0 says until it closes the group."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from moecore.assembly import Assembly, EngineOptions
from moecore.engine import Engine
from moecore.expert_parallel import agreement, codec
from moecore.expert_parallel.channel import Channel, ChannelLost, Inbox, Message
from moecore.expert_parallel.rank import Rank, open_transport
from moecore.model_runner import CachePlan
from moecore.transport import Transport

_BEAT = 1.0  # seconds between two signs of life while a model loads


class Refused(RuntimeError):
    """Rank 0 has ended the group, for the reason given."""


class Worker:
    """A rank other than 0.

    Args:
        channel: to rank 0; closed at the end.
        on_orphaned: called, on another thread, if rank 0 is gone before it closed the group.
    """

    def __init__(self, channel: Channel, on_orphaned: Callable[[], object]) -> None:
        self._channel = channel
        self._on_orphaned = on_orphaned
        self._inbox = Inbox({0: channel}, self._lost)
        self._phase = "while it started"
        self._transport: Transport | None = None
        self._segment: Path | None = None
        self._rank: Rank | None = None

    def wait_for_options(self) -> tuple[EngineOptions, int, int, float]:
        """What rank 0 wants: options, rank, size, and patience in seconds."""
        message = self._receive("options")
        options = EngineOptions(**message["options"])
        return options, message["rank"], message["size"], message["patience"]

    def serve(
        self,
        options: EngineOptions,
        rank: int,
        size: int,
        patience: float,
        transport: Transport | None = None,
    ) -> None:
        """Load the model, then run passes until rank 0 closes the group.

        Args:
            options: of this rank.
            rank: in [1, size).
            size: ranks of the group.
            patience: seconds of silence after which a rank counts as lost.
            transport: this rank's, if it has one already.

        Raises:
            Refused: rank 0 has ended the group because of an error.
            ChannelLost: rank 0 is gone.
            Exception: what went wrong here, once rank 0 knows of it.
        """
        self._transport = transport
        try:
            with self._signs_of_life(min(_BEAT, patience / 4)):
                engine = self._prepare(options, rank, size, patience)
            self._phase = "between passes"
            while self._obey(engine):
                pass
        except (Refused, ChannelLost):
            raise
        except BaseException as error:
            self._report("failed", phase=self._phase, error=codec.encode_error(error))
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Free everything."""
        if self._rank is not None:
            self._rank.close()
        elif self._transport is not None:
            self._transport.close()
        self._inbox.close()
        self._channel.close()

    def _prepare(self, options: EngineOptions, rank: int, size: int, patience: float) -> Engine:
        self._phase = "while it read the model's description"
        assembly = Assembly(options)
        self._channel.send(
            "hello",
            facts=agreement.facts_of(assembly, size),
            place=agreement.place_of_rank(assembly.device),
        )
        self._phase = "while the ranks met"
        plan = self._receive("open")
        if self._transport is None:
            self._segment = segment_of(plan["hosts"])
            self._transport = open_transport(plan, rank, size, assembly.device, patience)
        self._phase = "while it loaded the model"
        self._rank = Rank(assembly, self._transport, plan["threads"])
        cache = self._rank.load(progress=False)
        self._channel.send("loaded", num_blocks=cache.num_blocks, max_model_len=cache.max_model_len)
        agreed = self._receive("start")
        return self._rank.start(CachePlan(agreed["num_blocks"], agreed["max_model_len"]))

    def _obey(self, engine: Engine) -> bool:
        """Do what the next message says; returns whether to go on."""
        message = self._inbox.get(0, None)
        if message["type"] == "close":
            if message["reason"] is not None:
                raise Refused(message["reason"])
            return False
        if message["type"] == "add":
            params = codec.decode_params(message["params"])
            engine.add_request(
                message["id"],
                message["prompt_token_ids"],
                params,
                stream=message["stream"],
                number=message["number"],
            )
        elif message["type"] == "abort":
            output = engine.abort_request(message["id"])
            self._channel.send("aborted", output=output and codec.encode_output(output))
        else:
            self._run_pass(message["number"])
        return True

    def _run_pass(self, number: int) -> None:
        assert self._rank is not None
        self._phase = f"in pass {number}"
        outputs, failure = [], None
        try:
            outputs = [codec.encode_output(output) for output in self._rank.run_pass(number)]
        except Exception as error:
            if not self._rank.has_run(number):
                raise
            failure = codec.encode_error(error)  # the group can go on, its requests cannot
        self._channel.send("done", number=number, outputs=outputs, error=failure)
        self._phase = "between passes"

    def _receive(self, kind: str) -> Message:
        message = self._inbox.get(0, None)
        if message["type"] == "close":
            raise Refused(message["reason"] or "rank 0 has closed the group")
        assert message["type"] == kind
        return message

    def _report(self, kind: str, **values: Any) -> None:
        with suppress(ChannelLost, TimeoutError):  # nobody is left who would want to know
            self._channel.send(kind, **values)

    @contextmanager
    def _signs_of_life(self, period: float) -> Iterator[None]:
        """Let rank 0 know that this process runs, however long loading takes."""
        ready = threading.Event()

        def beat() -> None:
            while not ready.wait(period):
                self._report("alive")

        thread = threading.Thread(target=beat, name="moecore-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ready.set()
            thread.join()

    def _lost(self, _: int) -> None:
        if self._segment is not None:
            self._segment.unlink(missing_ok=True)
        if self._transport is not None:
            self._transport.abort("rank 0 is gone")
        self._on_orphaned()


def segment_of(name: str | None) -> Path | None:
    """The file of a shared-memory transport; it has a name only until all ranks have met."""
    return None if name is None else Path(f"/dev/shm/moecore.{name}")


def main(descriptor: int) -> NoReturn:
    """Serve the rank 0 that started this process; its channel is the socket of that number."""
    # Ctrl-C reaches the whole process group: rank 0 decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor), patience=60.0)
    worker = Worker(channel, on_orphaned=lambda: os._exit(1))
    status = 1
    with suppress(Refused, ChannelLost, Exception):  # rank 0 has been told, and shows it
        worker.serve(*worker.wait_for_options())
        status = 0
    sys.stderr.flush()
    os._exit(status)  # everything is closed; to take the interpreter apart would only take time
