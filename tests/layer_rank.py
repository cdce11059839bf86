"""A process that is one rank of a layer, in one group after another.

Run as `python layer_rank.py NAME RANK SIZE FAULT,...`. Each fault is rank 1's and ends a group:
every other rank prints what it is told, must hold nothing of that group any more, and goes on in
the next. In each, the layer has the bits of one rank.
"""

import gc
import os
import signal
import sys
import time
from pathlib import Path

import torch

import moecore
import test_expert_parallel as layers

DEADLINE = 1.0
FAULTY = 1
_FAULTY_STEP = 5


def join(name, rank, size):
    return moecore.Transport.shm(name, rank, size, deadline=DEADLINE, connect_deadline=20)


def check_bits(layer, whole, rank):
    hidden, logits = layers.tokens_of(rank, 3 + rank)
    for _ in range(10):
        assert torch.equal(layer(hidden, logits), whole(hidden, logits))


def wider(tensors):
    """The layer with experts of another size: another model."""
    changed = dict(tensors)
    changed["gate_up"] = tensors["gate_up"].repeat(1, 2, 1)
    changed["down"] = tensors["down"].repeat(1, 1, 2)
    return changed


def fail(fault, transport, layer, tensors):
    """What rank 1 does instead of a step; returns the layer that it goes on with, if any."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "late":
        time.sleep(DEADLINE + 0.7)
    elif fault == "abort":
        transport.abort("the disk is full")
    elif fault == "exception":
        hidden, logits = layers.tokens_of(FAULTY, 4)
        layer(hidden[:, :7].contiguous(), logits)
    elif fault == "leave":
        return None
    elif fault == "other model":
        return layers.cut(wider(tensors), transport)
    elif fault == "other options":
        return layers.cut(tensors, transport, num_groups=3)
    return layer


def held():
    """Threads of this process, and its mappings of a transport's memory."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    mappings = sum("moecore." in line for line in Path("/proc/self/maps").read_text().splitlines())
    return threads, mappings


def run_until_lost(name, rank, size, fault):
    """Join a group and work in it until `fault` ends it; prints what this rank was told."""
    transport = join(name, rank, size)
    tensors = layers.random_layer()
    layer = layers.cut(tensors, transport, num_groups=2, schedule="all_to_all")
    check_bits(layer, layers.whole(tensors), rank)
    assert held()[1] > 0
    if fault == "none":
        return
    hidden, logits = layers.tokens_of(rank, 3 + rank)
    start = time.perf_counter()
    try:
        for step in range(10**6):
            start = time.perf_counter()
            if rank == FAULTY and step == _FAULTY_STEP:
                layer = fail(fault, transport, layer, tensors)
                if layer is None:
                    return
            layer(hidden, logits)
    except (moecore.TransportError, ValueError) as error:
        if rank != FAULTY:
            seconds = time.perf_counter() - start
            print(f"{error.rank}|{error.phase}|{seconds:.2f}|{error}", flush=True)


def main():
    name, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    moecore.set_num_threads(1)
    torch.set_num_threads(1)
    before = held()
    for number, fault in enumerate(sys.argv[4].split(",")):
        run_until_lost(f"{name}-{number}", rank, size, fault)
        gc.collect()
        assert held() == before, (fault, held(), before)
        if fault in ("kill", "stop"):  # the others are a group of their own from now on
            rank, size = rank - (rank > FAULTY), size - 1
    print("end", flush=True)


if __name__ == "__main__":
    main()
