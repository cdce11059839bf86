"""Messages between two ranks: JSON objects over a stream socket, read on a thread of their own."""

from __future__ import annotations

import json
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

Message = dict[str, Any]  # "type" says which

_LENGTH = struct.Struct("<Q")
_LARGEST = 1 << 30  # bytes of a message
_PIECE = 1 << 18


class ChannelLost(Exception):
    """The other side is gone: its process has ended or closed the connection."""


class Channel:
    """One end of a connection. Any thread may send, one may read.

    Args:
        connection: a connected stream socket, which the channel owns.
        patience: seconds that a send may take.
    """

    def __init__(self, connection: socket.socket, patience: float) -> None:
        connection.settimeout(patience)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection = connection
        self._sending = threading.Lock()
        self._received = bytearray()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, kind: str, /, **values: Any) -> None:
        """Send a message.

        Raises:
            ChannelLost: the other side is gone.
            TimeoutError: it takes nothing.
        """
        text = json.dumps({"type": kind, **values}).encode()
        try:
            with self._sending:
                self._connection.sendall(_LENGTH.pack(len(text)) + text)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelLost(str(error)) from error

    def read(self) -> list[Message]:
        """Wait for bytes, and return the messages that they complete.

        Raises:
            ChannelLost: the other side is gone, or sends what is no message.
        """
        try:
            piece = self._connection.recv(_PIECE)
        except OSError as error:
            raise ChannelLost(str(error)) from error
        if not piece:
            raise ChannelLost("end of stream")
        self._received += piece
        messages: list[Message] = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            end = _LENGTH.size + length
            if length > _LARGEST:
                raise ChannelLost(f"a message of {length} bytes")
            if len(self._received) < end:
                break
            messages.append(_parsed(bytes(self._received[_LENGTH.size : end])))
            del self._received[:end]
        return messages

    def close(self) -> None:
        """End the connection in both directions: the other side sees it, and so does a reader."""
        with suppress(OSError):  # the other side was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _parsed(text: bytes) -> Message:
    try:
        message = json.loads(text)
    except ValueError as error:
        raise ChannelLost(f"no JSON: {error}") from error
    if not isinstance(message, dict) or "type" not in message:
        raise ChannelLost("a message without a type")
    return message


class Inbox:
    """Messages from several ranks, and who is lost; a thread reads them.

    A lost rank is noticed at once, also while this rank is in a pass: `on_loss` is for that.

    Args:
        channels: by rank.
        on_loss: called with the rank, on the reading thread, when its channel ends before `close`.
    """

    def __init__(self, channels: Mapping[int, Channel], on_loss: Callable[[int], object]) -> None:
        self._on_loss = on_loss
        self._changed = threading.Condition()
        self._messages: dict[int, deque[Message]] = {rank: deque() for rank in channels}
        self._heard = dict.fromkeys(channels, time.monotonic())
        self._lost: set[int] = set()
        self._closed = False
        self._waker, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker, selectors.EVENT_READ)
        for rank, channel in channels.items():
            self._selector.register(channel, selectors.EVENT_READ, (rank, channel))
        self._thread = threading.Thread(target=self._read, name="moecore-inbox", daemon=True)
        self._thread.start()

    def get(self, rank: int, patience: float | None) -> Message:
        """Return the rank's next message.

        Args:
            rank: one of the channels'.
            patience: seconds of silence after which to give up; "alive" messages end a silence, and
                are not returned. None waits for ever.

        Raises:
            ChannelLost: the rank is gone, and everything it sent has been returned.
            TimeoutError: it was silent for too long.
        """
        begin = time.monotonic()
        with self._changed:
            while not self._messages[rank]:
                if rank in self._lost:
                    raise ChannelLost(f"rank {rank}")
                left = None
                if patience is not None:
                    left = max(begin, self._heard[rank]) + patience - time.monotonic()
                    if left <= 0:
                        raise TimeoutError(f"rank {rank} is silent for {patience:g} s")
                self._changed.wait(left)
            return self._messages[rank].popleft()

    def peek(self, rank: int) -> Message | None:
        """The message that `get` would return now, if there is one."""
        with self._changed:
            return self._messages[rank][0] if self._messages[rank] else None

    def is_lost(self, rank: int) -> bool:
        with self._changed:
            return rank in self._lost

    def close(self) -> None:
        """Stop reading; losses count no more."""
        self._closed = True
        self._wake.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _read(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._read_from(*key.data)
        self._selector.close()
        self._waker.close()

    def _read_from(self, rank: int, channel: Channel) -> None:
        try:
            messages = channel.read()
        except ChannelLost:
            self._selector.unregister(channel)
            with self._changed:
                self._lost.add(rank)
                self._changed.notify_all()
            if not self._closed:
                self._on_loss(rank)
            return
        with self._changed:
            self._heard[rank] = time.monotonic()
            self._messages[rank].extend(m for m in messages if m["type"] != "alive")
            self._changed.notify_all()
