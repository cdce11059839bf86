"""Expert parallelism from Python: threads and processes as ranks, equal bits, and every fault."""

import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

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
        assert {"dispatch 0", "dispatch 1", "experts 0", "return 1", "combine"} <= names


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
        transport.barrier()
    with pytest.raises(ValueError, match="Transport: it must be open, got a closed one"):
        transport.barrier()


# --- Ranks as processes ---

RANK = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import torch, moecore
import test_expert_parallel as t
name, rank, size, fault = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
moecore.set_num_threads(1)
transport = moecore.Transport.shm(name, rank, size, deadline=1.5, connect_deadline=20)
tensors = t.random_layer()
layer, whole = t.cut(tensors, transport), t.whole(tensors)
hidden, logits = t.tokens_of(rank, 3 + rank)
for _ in range(10):
    assert torch.equal(layer(hidden, logits), whole(hidden, logits))
print("ready", flush=True)
if fault == "none":
    sys.exit()
start = time.perf_counter()
try:
    for step in range(10**6):
        if rank == 1 and step == 5:
            start = time.perf_counter()
            if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stop": os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "late": time.sleep(4)
            if fault == "raise": transport.abort("the model is not there")
            if fault == "leave": sys.exit()
        layer(hidden, logits)
except moecore.TransportError as error:
    print(f"{{error.rank}}|{{error.phase}}|{{time.perf_counter() - start:.2f}}|{{error}}")
"""


class Ranks:
    """Processes that are ranks, and what they printed."""

    def __init__(self, size, fault):
        self.name = f"test-{uuid.uuid4().hex}"
        code = textwrap.dedent(RANK.format(tests=str(Path(__file__).parent)))
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, self.name, str(rank), str(size), fault],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()

    def output(self, rank):
        return self.processes[rank].communicate(timeout=60)[0]

    def segment_is_gone(self):
        return not Path(f"/dev/shm/moecore.{self.name}").exists()


def test_processes_have_the_bits_of_one_rank():
    with Ranks(2, "none") as ranks:
        for rank in range(2):
            assert ranks.output(rank) == "ready\n"
        assert ranks.segment_is_gone()


@pytest.mark.parametrize(
    ("fault", "message", "within"),
    [
        ("kill", "rank 1 has died (process", 1.0),
        ("stop", "it is stopped (SIGSTOP)", 4.0),
        ("late", "rank 1 gave no sign in phase", 4.0),
        ("raise", "the model is not there", 1.0),
        ("leave", "rank 1 has closed its transport", 5.0),
    ],
)
def test_survivors_name_the_rank_at_fault_within_the_deadline(fault, message, within):
    size = 3 if fault == "kill" else 2
    with Ranks(size, fault) as ranks:
        for rank in [rank for rank in range(size) if rank != 1]:
            lines = ranks.output(rank).splitlines()
            assert lines[0] == "ready", lines
            assert len(lines) == 2, lines
            culprit, phase, _, text = lines[1].split("|", 3)
            assert culprit == "1", lines
            assert phase, lines
            assert message in text
            assert "new transport" in text
        # Seen by a clock outside: rank 0 measures from its own first step, a moment earlier.
        seconds = float(lines[1].split("|")[2])
        assert seconds < within + 3.0
        assert ranks.segment_is_gone()


def test_a_stale_segment_is_replaced():
    name = f"test-{uuid.uuid4().hex}"
    code = f"""
        import moecore
        moecore.Transport.shm({name!r}, 0, 2, connect_deadline=60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    segment = Path(f"/dev/shm/moecore.{name}")
    limit = time.monotonic() + 30
    while not segment.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.wait()
    assert segment.exists(), "what a crash leaves"

    results = [None, None]

    def join(rank):
        results[rank] = moecore.Transport.shm(name, rank, 2, connect_deadline=20)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [t.rank for t in results] == [0, 1]
    assert not segment.exists()


def test_a_name_in_use_is_refused():
    name = f"test-{uuid.uuid4().hex}"
    code = f"""
        import moecore
        moecore.Transport.shm({name!r}, 0, 2, connect_deadline=60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        limit = time.monotonic() + 30
        while not Path(f"/dev/shm/moecore.{name}").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.2)
        with pytest.raises(ValueError, match="name must not belong to a running group"):
            moecore.Transport.shm(name, 0, 2, connect_deadline=5)
    finally:
        process.terminate()
        process.wait()
        Path(f"/dev/shm/moecore.{name}").unlink(missing_ok=True)
