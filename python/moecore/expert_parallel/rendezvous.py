"""How ranks that a launcher started find rank 0: through torch.distributed's TCPStore."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    Store,
    TCPStore,
)

from moecore.expert_parallel.channel import Channel, ChannelLost
from moecore.expert_parallel.environment import Launch
from moecore.expert_parallel.members import Member

_KEY = "control"


def accept_ranks(launch: Launch, patience: float, wait: float) -> dict[int, Member]:
    """On rank 0: publish an address, and return the other ranks once all have come.

    Args:
        launch: this process's place.
        patience: seconds that a message may take, from then on.
        wait: seconds for all ranks to come.

    Raises:
        TimeoutError: some did not; the message names them.
    """
    loopback = _is_loopback(launch.address)
    token = secrets.token_hex(16)
    members: dict[int, Member] = {}
    deadline = time.monotonic() + wait
    with socket.create_server(("127.0.0.1" if loopback else "", 0)) as server:
        store = _store(launch, wait)
        port = server.getsockname()[1]
        store.set(_KEY, json.dumps({"port": port, "token": token}))
        while len(members) < launch.size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, launch.size)) - set(members))
                raise TimeoutError(
                    f"LLM: all {launch.size} ranks must come to {launch.address}:{launch.port}, "
                    f"got no sign of rank {', '.join(map(str, missing))} in {wait:g} s: see that "
                    "every rank makes an LLM with expert_parallel_size, and what it printed"
                ) from None
            channel = Channel(connection, patience)
            rank = _introduced(channel, token)
            if rank is None or rank in members:
                channel.close()
            else:
                members[rank] = Member(channel)
    return members


def connect_to_rank_0(launch: Launch, patience: float, wait: float) -> Channel:
    """On the other ranks: return a channel to rank 0.

    Raises:
        TimeoutError: rank 0 did not publish its address in `wait` seconds.
    """
    try:
        store = _store(launch, wait)
        meeting = json.loads(store.get(_KEY))
    except DistError as error:
        raise TimeoutError(
            f"LLM: rank 0 must come to {launch.address}:{launch.port}, got no sign of it on rank "
            f"{launch.rank} in {wait:g} s: see what rank 0 printed, and that MASTER_ADDR and "
            f"MASTER_PORT are the same on every rank ({error})"
        ) from None
    connection = socket.create_connection((launch.address, meeting["port"]), timeout=wait)
    channel = Channel(connection, patience)
    channel.send("introduction", rank=launch.rank, token=meeting["token"])
    return channel


def _store(launch: Launch, wait: float) -> Store:
    store = TCPStore(
        launch.address,
        launch.port,
        is_master=launch.rank == 0 and not launch.has_store,
        timeout=timedelta(seconds=wait),
        wait_for_workers=False,
    )
    return PrefixStore(f"moecore-{launch.key}", store)


def _introduced(channel: Channel, token: str) -> int | None:
    """The rank of whoever has connected, or None if it is none of the group's."""
    try:
        while not (messages := channel.read()):
            pass
    except ChannelLost:
        return None
    if not hmac.compare_digest(str(messages[0].get("token")), token):
        return None
    rank: int = messages[0]["rank"]
    return rank


def _is_loopback(address: str) -> bool:
    return socket.gethostbyname(address).startswith("127.")
