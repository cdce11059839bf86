"""Messages between ranks: order, losses, silences."""

import socket
import struct
import threading
import time

import pytest

from moecore.expert_parallel.channel import Channel, ChannelLost, Inbox


@pytest.fixture
def ends():
    """Rank 1's end, and rank 0's inbox with its losses."""
    mine, theirs = socket.socketpair()
    here, there = Channel(mine, patience=1.0), Channel(theirs, patience=1.0)
    losses = []
    inbox = Inbox({1: here}, losses.append)
    yield there, theirs, inbox, losses
    inbox.close()
    here.close()
    there.close()


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_messages_arrive_whole_and_in_order(ends):
    there, _, inbox, _ = ends
    there.send("a", text="\ud83c caf\u00e9", number=0.1, nothing=None)
    threading.Thread(target=there.send, args=("b",), kwargs={"ids": list(range(300_000))}).start()
    first, second = inbox.get(1, 5.0), inbox.get(1, 5.0)
    assert first == {"type": "a", "text": "\ud83c caf\u00e9", "number": 0.1, "nothing": None}
    assert second == {"type": "b", "ids": list(range(300_000))}


def test_a_lost_rank_is_noticed_at_once_and_after_its_last_message(ends):
    there, _, inbox, losses = ends
    there.send("last")
    there.close()
    wait_for(lambda: losses == [1])
    assert inbox.is_lost(1)
    assert inbox.peek(1) == inbox.get(1, 1.0) == {"type": "last"}
    with pytest.raises(ChannelLost):
        inbox.get(1, 1.0)


def test_signs_of_life_end_a_silence(ends):
    there, _, inbox, _ = ends

    def beat():
        for _ in range(6):
            time.sleep(0.1)
            there.send("alive")
        there.send("ready")

    threading.Thread(target=beat).start()
    assert inbox.get(1, 0.4) == {"type": "ready"}
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        inbox.get(1, 0.2)
    assert 0.15 < time.monotonic() - begin < 2.0


def test_a_peer_that_takes_nothing_is_a_timeout():
    mine, theirs = socket.socketpair()
    channel = Channel(mine, patience=0.1)
    with pytest.raises(TimeoutError):
        channel.send("long", text="x" * 10_000_000)
    channel.close()
    theirs.close()


@pytest.mark.parametrize(
    "data",
    [struct.pack("<Q", 1 << 40), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 1) + b"{"],
    ids=["too long", "no object", "no JSON"],
)
def test_what_is_no_message_ends_the_channel(ends, data):
    _, raw, _inbox, losses = ends
    raw.sendall(data)
    wait_for(lambda: losses == [1])


def test_closing_an_inbox_is_no_loss(ends):
    there, _, inbox, losses = ends
    inbox.close()
    there.close()
    time.sleep(0.05)
    assert losses == []
