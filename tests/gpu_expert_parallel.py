"""Expert parallelism on one GPU or more: run by hand, `python tests/gpu_expert_parallel.py`.

Compares the bits of every rank with one layer that has all experts, over virtual ranks on one GPU
and, where there are two GPUs, over NCCL; replays the fixed-shape layer from a CUDA graph; and stops
a rank, which the others must report by name.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import torch

import moecore
from moecore import ops

HIDDEN, INNER, EXPERTS, TOP_K = 512, 256, 16, 4


def random_layer(device):
    generator = torch.Generator().manual_seed(0)

    def weights(*shape):
        values = torch.randn(*shape, generator=generator) * 0.1
        return values.to(torch.bfloat16).to(device)

    return {
        "gate_up": weights(EXPERTS, 2 * INNER, HIDDEN),
        "down": weights(EXPERTS, HIDDEN, INNER),
        "shared_gate_up": weights(2 * INNER, HIDDEN),
        "shared_down": weights(HIDDEN, INNER),
    }


def cut(tensors, transport=None, **how):
    experts = moecore.expert_range(EXPERTS, transport.rank, transport.size)
    share = slice(experts.start, experts.stop)
    return moecore.MoELayer(
        tensors["gate_up"][share],
        tensors["down"][share],
        ops.RoutingConfig(top_k=TOP_K),
        num_experts=EXPERTS,
        first_expert=experts.start,
        shared_gate_up=tensors["shared_gate_up"],
        shared_down=tensors["shared_down"],
        transport=transport,
        **how,
    )


def tokens_of(rank, count, device):
    generator = torch.Generator().manual_seed(rank + 1)
    hidden = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16).to(device)
    return hidden, torch.randn(count, EXPERTS, generator=generator).to(device)


def check_rank(transport, device):
    """Every schedule against one rank with all experts."""
    torch.cuda.set_device(device)
    tensors = random_layer(device)
    whole = moecore.MoELayer(
        tensors["gate_up"],
        tensors["down"],
        ops.RoutingConfig(top_k=TOP_K),
        shared_gate_up=tensors["shared_gate_up"],
        shared_down=tensors["shared_down"],
    )
    schedules = [{"schedule": "all_to_all", "num_groups": g} for g in (1, 2, 4)]
    schedules += [{"schedule": "all_gather"}, {"schedule": "all_gather", "fixed_tokens": 400}, {}]
    for how in schedules:
        layer = cut(tensors, transport, **how)
        for count in (0, 1, 37, 300):
            own = 0 if count == 37 and transport.rank == 0 else count + transport.rank
            hidden, logits = tokens_of(transport.rank, own, device)
            wanted = whole(hidden, logits)
            for _ in range(3):
                got = layer(hidden, logits)
                assert torch.equal(got, wanted), (transport.kind, transport.rank, how, count)
    fast = cut(tensors, transport, combine="fast")
    hidden, logits = tokens_of(transport.rank, 64, device)
    wanted = whole(hidden, logits).double()
    error = (fast(hidden, logits).double() - wanted).norm() / wanted.norm()
    assert error < 0.01, error


def check_graph(transport, device):
    """The fixed-shape layer in a CUDA graph."""
    tensors = random_layer(device)
    layer = cut(tensors, transport, schedule="all_gather", fixed_tokens=8)
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
        replayed = out.clone()
        layer(hidden, logits, out=out)
        assert torch.equal(replayed, out), "a replay has the bits of a call"
    transport.barrier("timing")
    start = time.perf_counter()
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    micros = (time.perf_counter() - start) / 200 * 1e6
    if transport.rank == 0:
        print(f"graph over {transport.kind}, {transport.size} ranks, 8 tokens: {micros:.1f} us")


def run_virtual_ranks(size):
    errors = []

    def work(transport):
        try:
            check_rank(transport, torch.device("cuda:0"))
        except BaseException as error:
            transport.abort(repr(error))
            errors.append(error)

    transports = moecore.Transport.in_process(size, device="cuda:0")
    threads = [threading.Thread(target=work, args=(t,)) for t in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    print(f"in_process on one GPU, {size} ranks: bits equal")


def nccl_rank(rank, size, name, mode):
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    hosts = moecore.Transport.shm(name, rank, size, connect_deadline=60)
    make_id = moecore.Transport.nccl_unique_id
    unique = make_id() if rank == 0 else bytes(128)
    unique = hosts.all_gather(torch.frombuffer(bytearray(unique), dtype=torch.uint8))[0]
    transport = moecore.Transport.nccl(
        bytes(unique.tolist()),
        rank,
        size,
        device=device,
        hosts=None if mode == "alone" else hosts,
        deadline=30.0,
    )
    check_rank(transport, device)
    if mode != "fault":
        check_graph(transport, device)
        if rank == 0:
            print(f"nccl, {size} ranks, hosts={mode != 'alone'}: bits equal;", transport.measure())
        else:
            transport.measure()
        return
    transport.deadline = 3.0
    layer = cut(random_layer(device), transport)
    hidden, logits = tokens_of(rank, 64, device)
    transport.barrier("before the fault")
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start, message = time.perf_counter(), ""
    while not message:
        try:
            layer(hidden, logits)
            torch.cuda.synchronize()
        except moecore.TransportError as error:
            message = str(error)
    assert f"rank {size - 1}" in message, message
    print(f"a killed rank was reported after {time.perf_counter() - start:.2f} s: {message}")
    assert torch.ones(4, device=device).sum().item() == 4.0, "the GPU still works"


def run_nccl(size, mode):
    name = uuid.uuid4().hex
    ranks = [
        subprocess.Popen([sys.executable, __file__, "rank", str(r), str(size), name, mode])
        for r in range(size)
    ]
    codes = [rank.wait(timeout=120) for rank in ranks]
    wanted = [0] * (size - 1) + [-signal.SIGKILL if mode == "fault" else 0]
    assert codes == wanted, codes


if __name__ == "__main__":
    if len(sys.argv) > 1:
        nccl_rank(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
    else:
        if torch.cuda.device_count() > 1:
            for mode in ("hosts", "alone", "fault"):
                run_nccl(torch.cuda.device_count(), mode)
        for ranks in (2, 4):
            run_virtual_ranks(ranks)
