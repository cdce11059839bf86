"""Expert parallelism from Python: threads as ranks, equal bits, and arguments."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import moecore
from moecore import ops

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 10, 3


def random_layer(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)

    def weights(*shape):
        return (torch.randn(*shape, generator=generator) * 0.2).to(dtype)

    return {
        "gate_up": weights(EXPERTS, 2 * INNER, HIDDEN),
        "down": weights(EXPERTS, HIDDEN, INNER),
        "shared_gate_up": weights(2 * INNER, HIDDEN),
        "shared_down": weights(HIDDEN, INNER),
    }


def cut(tensors, transport, **how):
    """This rank's share of the layer, packed as a loader would."""
    experts = moecore.expert_range(EXPERTS, transport.rank, transport.size)
    share = slice(experts.start, experts.stop)
    return moecore.MoELayer(
        ops.prepare_weights(tensors["gate_up"][share], gated=True),
        ops.prepare_weights(tensors["down"][share]),
        ops.RoutingConfig(top_k=TOP_K),
        num_experts=EXPERTS,
        first_expert=experts.start,
        shared_gate_up=tensors["shared_gate_up"],
        shared_down=tensors["shared_down"],
        transport=transport,
        **how,
    )


def whole(tensors):
    return moecore.MoELayer(
        tensors["gate_up"],
        tensors["down"],
        ops.RoutingConfig(top_k=TOP_K),
        shared_gate_up=tensors["shared_gate_up"],
        shared_down=tensors["shared_down"],
    )


def tokens_of(rank, count, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(rank + 1)
    hidden = torch.randn(count, HIDDEN, generator=generator).to(dtype)
    return hidden, torch.randn(count, EXPERTS, generator=generator)


def run_ranks(transports, body):
    """Calls body(transport) in a thread for each rank; returns results, or what was raised."""
    results = [None] * len(transports)

    def work(transport):
        try:
            results[transport.rank] = body(transport)
        except Exception as error:
            results[transport.rank] = error

    threads = [threading.Thread(target=work, args=(t,)) for t in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_groups": 2}, {"schedule": "all_gather"}],
    ids=["auto", "two-groups", "all-gather"],
)
def test_ranks_have_the_bits_of_one(size, how):
    tensors = random_layer()
    counts = [0 if rank == 1 else 3 + 5 * rank for rank in range(size)]
    layer = whole(tensors)
    wanted = [layer(*tokens_of(rank, count)) for rank, count in enumerate(counts)]

    def body(transport):
        part = cut(tensors, transport, **how)
        return part(*tokens_of(transport.rank, counts[transport.rank]))

    got = run_ranks(moecore.Transport.in_process(size), body)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_fast_is_close():
    tensors = random_layer(torch.float32)
    layer = whole(tensors)

    def body(transport):
        hidden, logits = tokens_of(transport.rank, 9, torch.float32)
        return cut(tensors, transport, combine="fast")(hidden, logits) - layer(hidden, logits)

    # The sum of three terms in another order: a few units in the last place of its largest.
    for difference in run_ranks(moecore.Transport.in_process(3), body):
        assert difference.abs().max() < 1e-5


def test_all_gather_takes_any_dtype():
    def body(transport):
        for dtype in (torch.bool, torch.float64, torch.uint8, torch.bfloat16):
            mine = torch.full((2, 3), transport.rank).to(dtype)
            got = transport.all_gather(mine)
            assert got.dtype == dtype
            assert got.shape == (2, 2, 3)
            assert torch.equal(got[1], torch.full((2, 3), 1).to(dtype))
        return transport.all_gather(torch.tensor(transport.rank + 5)).tolist()

    assert run_ranks(moecore.Transport.in_process(2), body) == [[5, 6], [5, 6]]


def test_a_bad_call_on_one_rank_ends_all_with_its_message():
    tensors = random_layer()

    def body(transport):
        layer = cut(tensors, transport)
        hidden, logits = tokens_of(transport.rank, 4)
        return layer(hidden[:, :7].contiguous() if transport.rank == 1 else hidden, logits)

    errors = run_ranks(moecore.Transport.in_process(3), body)
    assert isinstance(errors[1], ValueError)
    for rank in (0, 2):
        assert isinstance(errors[rank], moecore.TransportError)
        assert errors[rank].rank == 1
        assert "rank 1 has failed in phase" in str(errors[rank])
        assert "hidden_states" in str(errors[rank])


def test_trace_can_be_read(tmp_path):
    import json

    tensors = random_layer()

    def body(transport):
        layer = cut(tensors, transport, num_groups=2, schedule="all_to_all")
        transport.measure()
        transport.start_trace()
        layer(*tokens_of(transport.rank, 4))
        path = tmp_path / f"{transport.rank}.json"
        transport.write_trace(path)
        events = json.loads(path.read_text())["traceEvents"]
        assert "all-to-all in 2 groups" in transport.last_choice
        return {event["name"] for event in events}

    for names in run_ranks(moecore.Transport.in_process(2), body):
        assert {"dispatch", "experts 0", "experts 1", "return", "combine"} <= names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moecore.Transport.in_process(0), r"size must be in \[1, 256\], got 0"),
        (lambda: moecore.Transport.shm("a/b", 0, 2), "name must be .* got 'a/b'"),
        (lambda: moecore.Transport.shm("a", 2, 2), r"rank must be in \[0, size\), got 2"),
        (lambda: moecore.Transport.in_process(1, deadline=0), "deadline must be > 0"),
        (lambda: moecore.expert_range(3, 0, 4), "size must be <= num_experts, got 4"),
        (
            lambda: cut(random_layer(), moecore.Transport.loopback(), combine="other"),
            "combine must be one of exact, fast, got other",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"short", 0, 1), "unique_id must have 128 bytes, got 5"),
        ((bytes(128), 2, 2), r"rank must be in \[0, size\), got 2 with size 2"),
    ],
)
def test_bad_nccl_arguments_are_named_before_nccl_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        moecore.Transport.nccl(*arguments, device="cuda:0")


def test_peer_copies_need_a_gpu():
    hosts = moecore.Transport.loopback()
    with pytest.raises(ValueError, match="device must be a GPU, got cpu"):
        moecore.Transport.peer(hosts, device="cpu")
    hosts.barrier("still there")


def test_a_missing_nccl_is_reported_with_the_paths_tried():
    code = (
        "import moecore\n"
        "try: moecore.Transport.nccl_unique_id()\n"
        "except moecore.UnsupportedError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["MOECORE_NCCL"] = "/nowhere/libnccl.so.2"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert "found no NCCL" in output
    assert "/nowhere/libnccl.so.2" in output


def test_a_closed_transport_says_so():
    with moecore.Transport.loopback() as transport:
        assert transport.deadline == 30.0
        transport.barrier()
        transport.synchronize()  # on the CPU nothing is left to wait for
    with pytest.raises(ValueError, match="Transport: it must be open, got a closed one"):
        transport.barrier()
