"""Virtual ranks on one GPU: run by hand, `python tests/gpu_expert_parallel.py`.

Compares the bits of every rank with one layer that has all experts: every schedule, a thousand
random layers with every kind of skew, and the fixed-shape layer of all ranks in one CUDA graph.
gpu_nccl.py does the same over NCCL, and fails in every way; this runs it, too, where there are
several GPUs, or NCCL_MULTI_RANK_GPU_ENABLE=1 lets NCCL 2.30 or newer put several ranks on one.
"""

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

import moecore
from moecore import ops

HIDDEN, INNER, EXPERTS, TOP_K = 512, 256, 16, 4


def random_layer(device, hidden=HIDDEN, inner=INNER, experts=EXPERTS):
    generator = torch.Generator().manual_seed(0)

    def weights(*shape):
        values = torch.randn(*shape, generator=generator) * 0.1
        return values.to(torch.bfloat16).to(device)

    return {
        "gate_up": weights(experts, 2 * inner, hidden),
        "down": weights(experts, hidden, inner),
        "shared_gate_up": weights(2 * inner, hidden),
        "shared_down": weights(hidden, inner),
    }


def cut(tensors, transport, top_k=TOP_K, **how):
    """The layer of one rank."""
    num_experts = tensors["down"].shape[0]
    experts = moecore.expert_range(num_experts, transport.rank, transport.size)
    share = slice(experts.start, experts.stop)
    return moecore.MoELayer(
        tensors["gate_up"][share],
        tensors["down"][share],
        ops.RoutingConfig(top_k=top_k),
        num_experts=num_experts,
        first_expert=experts.start,
        shared_gate_up=tensors["shared_gate_up"],
        shared_down=tensors["shared_down"],
        transport=transport,
        **how,
    )


def whole(tensors, top_k=TOP_K):
    """The layer with all experts."""
    return moecore.MoELayer(
        tensors["gate_up"],
        tensors["down"],
        ops.RoutingConfig(top_k=top_k),
        shared_gate_up=tensors["shared_gate_up"],
        shared_down=tensors["shared_down"],
    )


def tokens_of(rank, count, device):
    generator = torch.Generator().manual_seed(rank + 1)
    hidden = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16).to(device)
    return hidden, torch.randn(count, EXPERTS, generator=generator).to(device)


def check_rank(transport, device):
    """Every schedule against one rank with all experts."""
    torch.cuda.set_device(device)
    tensors = random_layer(device)
    alone = whole(tensors)
    schedules = [{"schedule": "all_to_all", "num_groups": g} for g in (1, 2, 4)]
    schedules += [{"schedule": "all_gather"}, {"schedule": "all_gather", "fixed_tokens": 400}, {}]
    for how in schedules:
        layer = cut(tensors, transport, **how)
        for count in (0, 1, 37, 300):
            own = 0 if count == 37 and transport.rank == 0 else count + transport.rank
            hidden, logits = tokens_of(transport.rank, own, device)
            wanted = alone(hidden, logits)
            for _ in range(3):
                got = layer(hidden, logits)
                assert torch.equal(got, wanted), (transport.kind, transport.rank, how, count)
    fast = [cut(tensors, transport, combine="fast", num_groups=g) for g in (1, 2, 4)]
    for count in (0, 1, 37, 300):
        own = 0 if count == 37 and transport.rank == 0 else count + transport.rank
        hidden, logits = tokens_of(transport.rank, own, device)
        wanted = alone(hidden, logits)
        got = [layer(hidden, logits) for layer in fast]
        error = (got[0].double() - wanted.double()).norm() / wanted.double().norm()
        assert own == 0 or error < 0.01, (count, error)
        assert all(torch.equal(one, got[0]) for one in got), (transport.kind, count)


# --- Random layers ---

SHAPES = [(64, 32, 8, 2), (128, 96, 11, 3), (512, 256, 16, 4), (72, 40, 9, 1)]  # H, I, E, k


def skewed_logits(skew, count, experts, top_k, generator):
    """Router logits that prefer experts evenly, by a power law, one, or those of the first rank."""
    logits = torch.randn(count, experts, generator=generator, device=generator.device)
    numbers = torch.arange(experts, device=logits.device)
    if skew == "power law":
        logits -= 2.0 * torch.log(1.0 + numbers)
    elif skew == "one expert":
        logits[:, 5 % experts] += 50.0
    elif skew == "first experts":
        logits += 50.0 * (numbers < top_k)
    return logits


def check_random_layers(transport, device, num_layers):
    """Layers of random shape, schedule, tokens and skew, one after another."""
    choose = random.Random(7)  # the same on every rank
    generator = torch.Generator(device)
    layers = {}
    for number in range(num_layers):
        shape = choose.choice(SHAPES)
        how = choose.choice(
            [{"schedule": "all_to_all", "num_groups": g} for g in (1, 2, 3)]
            + [{"schedule": "all_gather"}, {}]
        )
        skew = choose.choice(["even", "power law", "one expert", "first experts"])
        counts = [max(0, choose.randrange(-60, 200)) for _ in range(transport.size)]
        key = shape, str(how)
        if key not in layers:
            tensors = random_layer(device, *shape[:3])
            layers[key] = (
                cut(tensors, transport, top_k=shape[3], **how),
                whole(tensors, top_k=shape[3]),
            )
        generator.manual_seed(64 * number + transport.rank)
        count = counts[transport.rank]
        hidden = torch.randn(count, shape[0], generator=generator, device=device).bfloat16()
        logits = skewed_logits(skew, count, *shape[2:], generator)
        layer, alone = layers[key]
        got = layer(hidden, logits)
        transport.synchronize("a random layer")
        assert torch.equal(got, alone(hidden, logits)), (transport.rank, number, shape, how, skew)


# --- CUDA graphs ---


def check_graph_of_virtual_ranks(transports, device):
    """The fixed-shape layers of all ranks, captured in one graph: each on a stream of its own."""
    tensors, size = random_layer(device), len(transports)
    alone = whole(tensors)
    layers = [cut(tensors, t, schedule="all_gather", fixed_tokens=8) for t in transports]
    inputs = [tokens_of(rank, 8, device) for rank in range(size)]
    outs = [torch.empty_like(hidden) for hidden, _ in inputs]
    streams = [torch.cuda.Stream() for _ in range(size)]

    def run(transport):
        rank = transport.rank
        with torch.cuda.stream(streams[rank]):
            layers[rank](*inputs[rank], out=outs[rank])

    for _ in range(3):
        run_ranks(transports, run)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[0], capture_error_mode="relaxed"):
        for stream in streams[1:]:
            stream.wait_stream(streams[0])
        run_ranks(transports, run)
        for stream in streams[1:]:
            streams[0].wait_stream(stream)
    for seed in range(1, 4):
        for rank, (hidden, logits) in enumerate(inputs):
            new_hidden, new_logits = tokens_of(rank + 100 * seed, 8, device)
            hidden.copy_(new_hidden)
            logits.copy_(new_logits)
            outs[rank].fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        for rank, (hidden, logits) in enumerate(inputs):
            assert torch.equal(outs[rank], alone(hidden, logits)), ("graph", size, rank)


def run_ranks(transports, body):
    """Calls body(transport) in a thread for each rank; raises what the first of them raised."""
    errors = []

    def work(transport):
        try:
            body(transport)
        except BaseException as error:
            errors.append(error)
            with suppress(ValueError):  # closed, or taken over by another
                transport.abort(repr(error))

    threads = [threading.Thread(target=work, args=(t,)) for t in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def run_virtual_ranks(size, num_layers, device="cuda:0"):
    start = time.perf_counter()
    transports = moecore.Transport.in_process(size, device=device)
    run_ranks(transports, lambda t: check_rank(t, torch.device(device)))
    run_ranks(transports, lambda t: check_random_layers(t, torch.device(device), num_layers))
    check_graph_of_virtual_ranks(transports, torch.device(device))
    seconds = time.perf_counter() - start
    print(
        f"{size} virtual ranks: schedules, {num_layers} random layers and a graph of all ranks "
        f"have the bits of one rank ({seconds:.1f} s)",
        flush=True,
    )


def main():
    for size in (1, 2, 4, 8):
        run_virtual_ranks(size, 1000 if size == 2 else 250)
    program = str(Path(__file__).with_name("gpu_nccl.py"))
    subprocess.run([sys.executable, program, "--transport", "peer"], check=True)
    if torch.cuda.device_count() > 1 or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        subprocess.run([sys.executable, program], check=True)


if __name__ == "__main__":
    main()
