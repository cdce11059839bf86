"""The other ranks as rank 0 sees them: what they are told, what they answer, who is lost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moecore._core import TransportError, UnsupportedError
from moecore.expert_parallel import codec
from moecore.expert_parallel.channel import ChannelLost, Inbox, Message
from moecore.expert_parallel.members import Member, end_members
from moecore.transport import Transport

_CLOSE_SECONDS = 10.0  # for a rank to end by itself after its last message
_KILL_SECONDS = 0.5  # and after an error
_CAUSE_SECONDS = 1.0  # for the ranks to say why a pass failed
_ADVICE = "make a new LLM to go on"


class Group:
    """The ranks 1 .. size - 1 of a group.

    Args:
        members: by rank.
        patience: seconds of silence after which a rank counts as lost.
    """

    def __init__(self, members: Mapping[int, Member], patience: float) -> None:
        self._members = dict(members)
        self._patience = patience
        self._transport: Transport | None = None
        self._failures: dict[int, Message] = {}
        self._inbox = Inbox({r: m.channel for r, m in members.items()}, self._rank_lost)

    @property
    def ranks(self) -> list[int]:
        """Ranks of the group without 0."""
        return list(self._members)

    def attach(self, transport: Transport) -> None:
        """Abort this transport as soon as a rank is lost, so that a pass ends at once."""
        self._transport = transport
        for rank in self._members:
            if self._inbox.is_lost(rank):
                self._rank_lost(rank)

    def send(self, rank: int, kind: str, phase: str, /, **values: Any) -> None:
        """Send a message to one rank.

        Raises:
            TransportError: the rank is gone, or takes nothing.
        """
        try:
            self._members[rank].channel.send(kind, **values)
        except ChannelLost:
            raise self._gone(rank, phase) from None
        except TimeoutError:
            raise self._silent(rank, phase) from None

    def receive(self, rank: int, kind: str, phase: str, patience: float | None = None) -> Message:
        """Return the answer of one rank.

        Raises:
            TransportError: the rank is gone, silent for `patience` seconds (the group's), or
                stopped.
            Exception: what the rank raised.
        """
        message = self._await(rank, phase, self._patience if patience is None else patience)
        if message["type"] == "failed":
            self._failures[rank] = message
            raise codec.decode_error(message["error"], rank, message["phase"])
        assert message["type"] == kind
        return message

    def _await(self, rank: int, phase: str, patience: float) -> Message:
        end = time.monotonic() + patience
        while True:
            try:
                return self._inbox.get(rank, min(patience, self._patience))
            except ChannelLost:
                raise self._gone(rank, phase) from None
            except TimeoutError:
                if time.monotonic() >= end or self._members[rank].is_stopped():
                    raise self._silent(rank, phase) from None

    def check(self, phase: str) -> None:
        """Raise what `receive` would raise at once: for a rank that has failed or is gone."""
        for rank in self._members:
            message = self._inbox.peek(rank)
            has_failed = message is not None and message["type"] == "failed"
            if has_failed or (message is None and self._inbox.is_lost(rank)):
                self.receive(rank, "failed", phase)

    def cause(self, phase: str) -> Exception | None:
        """Why a pass failed, if a rank says so or is gone: the other ranks' errors only follow."""
        until = time.monotonic() + _CAUSE_SECONDS
        lost = []
        for rank in self._members:
            with suppress(TimeoutError):
                try:
                    while rank not in self._failures:
                        message = self._inbox.get(rank, max(0.0, until - time.monotonic()))
                        if message["type"] == "failed":
                            self._failures[rank] = message
                except ChannelLost:
                    lost.append(rank)
        for rank, failure in self._failures.items():
            if failure["error"]["class"] != TransportError.__name__:
                return codec.decode_error(failure["error"], rank, failure["phase"])
        return self._gone(lost[0], phase) if lost else None

    def close(self, reason: str | None) -> None:
        """Let every rank end: by itself, or without further ado if there is a reason, an error."""
        for member in self._members.values():
            with suppress(ChannelLost, TimeoutError):
                member.channel.send("close", reason=reason)
        self._inbox.close()
        if reason is not None:  # who is busy sees the end of its channel
            for member in self._members.values():
                member.channel.close()
        end_members(self._members, _CLOSE_SECONDS if reason is None else _KILL_SECONDS)

    def _rank_lost(self, rank: int) -> None:
        if self._transport is not None:
            self._transport.abort(f"rank {rank} {self._members[rank].fate()}")

    def _gone(self, rank: int, phase: str) -> TransportError:
        what = f"{self._members[rank].fate()}; what it printed may say why"
        return rank_error(rank, phase, what)

    def _silent(self, rank: int, phase: str) -> TransportError:
        why = (
            "it is stopped (SIGSTOP)"
            if self._members[rank].is_stopped()
            else "it hangs, or has too little processor time (a longer expert_parallel_timeout "
            "waits longer)"
        )
        return rank_error(rank, phase, f"has been silent for {self._patience:g} s: {why}")


def rank_error(rank: int, phase: str, what: str) -> TransportError:
    """The error that a rank is at fault for."""
    error = TransportError(f"LLM: rank {rank} {what}. It happened {phase}; {_ADVICE}")
    error.rank, error.phase = rank, phase
    return error


def in_context(error: TransportError, phase: str) -> TransportError:
    """The same fault, as a user of LLM meets it."""
    message = str(error)
    if message.startswith("LLM: "):
        return error
    told = TransportError(f"LLM: {message} It happened {phase}; {_ADVICE}")
    told.rank, told.phase = error.rank, error.phase
    return told


def thread_shares(places: list[Mapping[str, Any]], are_ours: bool) -> list[int]:
    """Threads of each rank: ranks that may use the same processors share them.

    Args:
        places: of each rank; see agreement.place_of_process.
        are_ours: whether moecore started the ranks, so that rank 0's threads are to be shared.
    """
    size = len(places)
    if are_ours:
        total = places[0]["threads"]
        return [max(1, total // size + (rank < total % size)) for rank in range(size)]
    shares = []
    for place in places:
        sharing = sum((p["host"], p["cpus"]) == (place["host"], place["cpus"]) for p in places)
        chosen = place["threads are chosen"]
        shares.append(place["threads"] if chosen else max(1, place["threads"] // sharing))
    return shares


def are_on_one_machine(places: list[Mapping[str, Any]]) -> bool:
    """Whether all ranks are; those on the CPU must be.

    Raises:
        UnsupportedError: they are not.
    """
    if len({place["host"] for place in places}) == 1:
        return True
    if any(place["device"] == "cpu" for place in places):
        hosts = sorted({str(place["host"]).split()[0] for place in places})
        raise UnsupportedError(
            f"LLM: ranks on the CPU must be on one machine, got {', '.join(hosts)}; ranks on "
            "several machines need CUDA and NCCL"
        )
    return False


def cache_shares(places: list[Mapping[str, Any]]) -> int:
    """By how much to divide a GPU's free memory: the most ranks that one GPU has; 1 on the CPU."""
    devices = [(place["host"], place["device"]) for place in places if place["device"] != "cpu"]
    return max((devices.count(device) for device in devices), default=1)
