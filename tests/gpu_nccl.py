"""Ranks over NCCL or peer memory: run by hand, `python tests/gpu_nccl.py [--transport peer]`.

A GPU for each rank where there are several. On one GPU peer memory works all the same, and NCCL
with NCCL_MULTI_RANK_GPU_ENABLE=1 from 2.30 on (MOECORE_NCCL names its file), 2 and 4 ranks. Ranks
are processes. Compares bits as gpu_expert_parallel.py does; then ranks fail in turn, the others
must report them by name in time, free their memory, and go on in a new group. Ranks with a GPU each
are threads, too: on one GPU they might wait for ever: memory that one frees waits for the other's
kernels.
"""

import argparse
import gc
import os
import signal
import subprocess
import sys
import time
import uuid

import torch

import moecore
from gpu_expert_parallel import (
    check_random_layers,
    check_rank,
    cut,
    random_layer,
    run_ranks,
    tokens_of,
    whole,
)

DEADLINE = 3.0
# Of the last rank of a group, which ends: how it fails, and in a layer that tells hosts or not.
FAULTS = ("exception", "stop fixed", "kill", "kill fixed", "stop")
_CHOICE = "MOECORE_TEST_TRANSPORT"  # of the processes: nccl or peer
_START = time.perf_counter()
_MEMORY_LEFT = 64 << 20  # what one process may hold more than before, on a GPU that others use too


def shares_gpu(size):
    return size > torch.cuda.device_count()


def device_of(rank):
    return torch.device("cuda", rank % torch.cuda.device_count())


def join(rank, size, hosts, keeps_hosts=True):
    if os.environ.get(_CHOICE) == "peer":
        return moecore.Transport.peer(hosts, device=device_of(rank))
    make_id = moecore.Transport.nccl_unique_id
    unique = make_id() if rank == 0 else bytes(128)
    unique = hosts.all_gather(torch.frombuffer(bytearray(unique), dtype=torch.uint8))[0]
    return moecore.Transport.nccl(
        bytes(unique.tolist()),
        rank,
        size,
        device=device_of(rank),
        hosts=hosts if keeps_hosts else None,
        connect_deadline=40.0,
    )


def check_graph(transport, device, num_replays):
    """The fixed-shape layer in a CUDA graph."""
    tensors = random_layer(device)
    layer, alone = cut(tensors, transport, schedule="all_gather", fixed_tokens=8), whole(tensors)
    hidden, logits = tokens_of(transport.rank, 8, device)
    out = torch.empty_like(hidden)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(hidden, logits, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        layer(hidden, logits, out=out)
    for seed in range(3):
        new_hidden, new_logits = tokens_of(transport.rank + 10 * seed, 8, device)
        hidden.copy_(new_hidden)
        logits.copy_(new_logits)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, alone(hidden, logits)), "a replay has other bits"
    transport.barrier("timing")
    start = time.perf_counter()
    for _ in range(num_replays):
        graph.replay()
    torch.cuda.synchronize()
    micros = (time.perf_counter() - start) / num_replays * 1e6
    what = f"graph over {transport.kind}, {transport.size} ranks, 8 tokens"
    tell(transport.rank, f"{what}: {micros:.1f} us")


# --- Faults ---


def fail(fault, layer, device):
    """What the last rank does instead of a layer."""
    if fault.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.startswith("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        hidden, logits = tokens_of(0, 4, device)
        layer(hidden[:, :7].contiguous(), logits)


def check_fault(transport, device, fault):
    """The others' error names the last rank; returns nothing that holds memory."""
    transport.deadline = DEADLINE
    rank, culprit = transport.rank, transport.size - 1
    is_fixed = fault.endswith("fixed")
    how = {"schedule": "all_gather", "fixed_tokens": 64} if is_fixed else {}
    layer = cut(random_layer(device), transport, **how)
    hidden, logits = tokens_of(rank, 64, device)
    layer(hidden, logits)
    transport.synchronize("before the fault")
    transport.barrier("before the fault")
    error, start = None, time.perf_counter()
    try:
        if rank == culprit:
            fail(fault, layer, device)
        while True:
            start = time.perf_counter()
            layer(hidden, logits)
            transport.synchronize("after a layer")
    except (moecore.TransportError, ValueError) as raised:
        seconds, error = time.perf_counter() - start, raised
    if rank == culprit:
        return
    text = str(error)
    assert isinstance(error, moecore.TransportError), text
    assert error.rank == culprit, text
    assert f"rank {culprit}" in text, text
    assert "phase '" in text, text
    assert "very rank needs a new transport" in text, text
    assert seconds < DEADLINE + 3.0, (seconds, text)
    assert torch.ones(4, device=device).sum().item() == 4.0, "the GPU still works"
    tell(rank, f"{transport.size} ranks, {fault}: {seconds:.2f} s: {text}")


def free_memory(device):
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def tell(rank, what):
    if rank == 0:
        print(f"{time.perf_counter() - _START:6.1f} s: {what}", flush=True)


def run_process(rank, size, name, num_layers):
    device = device_of(rank)
    torch.cuda.set_device(device)
    random_layer(device)
    hosts = moecore.Transport.shm(f"{name}-first", rank, size, connect_deadline=60)
    tell(rank, f"{size} processes have met")
    transport = join(rank, size, hosts)
    tell(rank, f"over {transport.kind}, too")
    check_rank(transport, device)
    tell(rank, "every schedule has the bits of one rank")
    if transport.can_capture:
        check_graph(transport, device, 20 if shares_gpu(size) else 200)
    check_random_layers(transport, device, num_layers)
    tell(rank, f"{num_layers} random layers have the bits of one rank")
    transport.close()
    for number, fault in enumerate(FAULTS):
        hosts = moecore.Transport.shm(f"{name}-{number}", rank, size, connect_deadline=60)
        hosts.barrier("all have closed the group before")
        before = free_memory(device)
        hosts.barrier("all have seen what is free")
        transport = join(rank, size, hosts)
        check_fault(transport, device, fault)
        transport.close()
        if fault != "exception":
            if rank == size - 1:
                return
            size -= 1
        hosts = moecore.Transport.shm(f"{name}-{number}-after", rank, size, connect_deadline=60)
        hosts.barrier("all have closed")
        after = free_memory(device)
        # Who is stopped, or ends at this moment, holds what it holds.
        assert fault != "exception" or after > before - _MEMORY_LEFT, (before, after)
        tell(rank, f"{(before - after) >> 20} MB less are free")
        hosts.barrier("all have looked")
        if size == 1:
            return
        transport = join(rank, size, hosts)
        hidden, logits = tokens_of(rank, 37, device)
        tensors = random_layer(device)
        got = cut(tensors, transport)(hidden, logits)
        assert torch.equal(got, whole(tensors)(hidden, logits)), "a new group has the same bits"
        transport.close()


def run_processes(size, num_layers):
    name = f"test-{uuid.uuid4().hex}"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(r), str(size), name, str(num_layers)]
        )
        for r in range(size)
    ]
    try:
        assert ranks[0].wait(timeout=300) == 0, "rank 0 has failed"
    finally:
        for rank in ranks:
            rank.kill()  # who is stopped, or hangs
        codes = [rank.wait() for rank in ranks]
    assert all(code in (0, -signal.SIGKILL) for code in codes), codes
    print(f"{os.environ[_CHOICE]}, {size} processes: bits equal, faults ({codes})", flush=True)


def run_threads(size, num_layers):
    """Random layers; with and without the hosts' group."""
    start = time.perf_counter()
    for keeps_hosts in (True, False) if os.environ[_CHOICE] == "nccl" else (True,):
        hosts = moecore.Transport.in_process(size)

        def work(host, keeps_hosts=keeps_hosts):
            rank = host.rank
            device = device_of(rank)
            torch.cuda.set_device(device)
            transport = join(rank, size, host, keeps_hosts)
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    check_random_layers(transport, device, num_layers if keeps_hosts else 50)
                measured = transport.measure()
                tell(rank, f"{size} threads, hosts={keeps_hosts}: {measured}")
            except BaseException as error:
                transport.abort(repr(error))
                raise

        run_ranks(hosts, work)
    seconds = time.perf_counter() - start
    print(
        f"{os.environ[_CHOICE]}, {size} threads: {num_layers} random layers ({seconds:.1f} s)",
        flush=True,
    )


def main():
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    count = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=("nccl", "peer"), default="nccl")
    sizes = [size for size in (2, 4, 8) if size <= max(count, 4 if count == 1 else 0)]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="numbers of ranks")
    parser.add_argument("--layers", type=int, default=1000, help="random layers")
    options = parser.parse_args()
    os.environ[_CHOICE] = options.transport
    is_nccl = options.transport == "nccl"
    if is_nccl and count == 1 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        raise SystemExit("one GPU: set NCCL_MULTI_RANK_GPU_ENABLE=1, which NCCL has from 2.30 on")
    for size in options.sizes:
        run_processes(size, options.layers)
        if not shares_gpu(size):
            run_threads(size, options.layers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_process(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        main()
