"""Processes as ranks of a layer: equal bits, and every fault."""

import shutil
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest

import moecore
from layer_rank import DEADLINE, FAULTY
from processes import path_environment

SHM = Path("/dev/shm")


class Ranks:
    """Processes that are ranks, and what they printed."""

    def __init__(self, size, *faults):
        self.name = f"test-{uuid.uuid4().hex}"
        program = str(Path(__file__).with_name("layer_rank.py"))
        self.processes = [
            subprocess.Popen(
                [sys.executable, program, self.name, str(rank), str(size), ",".join(faults)],
                env=path_environment(),
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

    def lines(self, rank):
        """What a rank printed, once it has ended by itself and well."""
        output = self.processes[rank].communicate(timeout=60)[0]
        assert self.processes[rank].returncode == 0, output
        return output.splitlines()

    def segments(self):
        return list(SHM.glob(f"moecore.{self.name}*"))


def check_report(report, after, message, remedy):
    """What a survivor was told: who, in which phase, what to do, and that in time."""
    culprit, phase, seconds, text = report.split("|", 3)
    assert culprit == str(FAULTY)
    assert phase
    assert f"phase '{phase}'" in text
    assert message in text
    assert remedy in text
    assert "very rank needs a new transport" in text
    # Two seconds: what a busy machine may add.
    assert after - 0.2 < float(seconds) < after + 2.0


@pytest.mark.parametrize(
    ("fault", "after", "message", "remedy"),
    [
        ("kill", 0.0, "rank 1 has died (process", "Restart it"),
        ("stop", DEADLINE, "it is stopped (SIGSTOP)", "Resume it (SIGCONT) or restart it"),
    ],
)
def test_survivors_of_a_lost_process_go_on_without_it(fault, after, message, remedy):
    with Ranks(3, fault, "none") as ranks:
        for rank in (0, 2):
            report, end = ranks.lines(rank)
            check_report(report, after, message, remedy)
            assert end == "end"
        assert ranks.segments() == []


FAULTS = {
    "late": (DEADLINE, "rank 1 gave no sign", "raise the deadline"),
    "abort": (0.0, "rank 1 has failed", "the disk is full"),
    "exception": (0.0, "rank 1 has failed", "hidden_states must have"),
    "leave": (0.0, "rank 1 has closed its transport", "see the log of the rank"),
    "other model": (0.0, "rank 1 differs in intermediate_size", "load the same model"),
    "other options": (0.0, "rank 1 differs in schedule", "with the same options"),
}


@pytest.fixture(scope="module")
def reports():
    """What rank 0 was told of each fault of a living process, all in the same two processes."""
    with Ranks(2, *FAULTS) as ranks:
        *lines, end = ranks.lines(0)
        assert ranks.lines(FAULTY) == [end] == ["end"]
        assert ranks.segments() == []
    return dict(zip(FAULTS, lines, strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rank_at_fault_is_named_and_a_new_group_works(fault, reports):
    check_report(reports[fault], *FAULTS[fault])


# --- Segments ---


def start_rank_0(name):
    """A process that waits for a rank 1, with its segment in place."""
    code = f"import moecore; moecore.Transport.shm({name!r}, 0, 2, connect_deadline=60)"
    process = subprocess.Popen([sys.executable, "-c", code], env=path_environment())
    limit = time.monotonic() + 30
    while not (SHM / f"moecore.{name}").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.1)
    return process


def test_a_stale_segment_is_replaced():
    name = f"test-{uuid.uuid4().hex}"
    process, segment = start_rank_0(name), SHM / f"moecore.{name}"
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
    process = start_rank_0(name)
    try:
        with pytest.raises(ValueError, match="name must not belong to a running group"):
            moecore.Transport.shm(name, 0, 2, connect_deadline=5)
    finally:
        process.terminate()
        process.wait()
        (SHM / f"moecore.{name}").unlink(missing_ok=True)


# Within a mount namespace of its own: /dev/shm has 8 MB, all but a few hundred KB taken.
FULL = """
    import os, threading
    from pathlib import Path
    import moecore
    shm = Path("/dev/shm")
    assert list(shm.iterdir()) == []
    with open(shm / "another", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, (8 << 20) - (300 << 10))

    errors = {}
    def join(rank, **options):
        try:
            return moecore.Transport.shm("full", rank, 2, connect_deadline=1.0, **options)
        except (ValueError, moecore.TransportError) as error:
            errors[rank] = error

    thread = threading.Thread(target=join, args=(1,))
    thread.start()
    assert join(0) is None
    thread.join()
    assert [path.name for path in shm.iterdir()] == ["another"]
    print(type(errors[0]).__name__, errors[0])
    print(type(errors[1]).__name__, errors[1].rank, errors[1].phase, errors[1])

    from moecore import LLM
    from moecore.expert_parallel import members
    start, ranks = members._start_process, []
    members._start_process = lambda *args: ranks.append(start(*args)) or ranks[-1]
    try:
        LLM(device="cpu", expert_parallel_size=2, use_tqdm=False)
    except ValueError as error:
        print(error)
    assert [rank.poll() is not None for rank in ranks] == [True]
    assert [path.name for path in shm.iterdir()] == ["another"]

    # The remedy.
    thread = threading.Thread(target=join, args=(1,), kwargs={"ring_bytes": 4096})
    thread.start()
    print(join(0, ring_bytes=4096).size)
    thread.join()
"""


def in_a_namespace(*command):
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *command]


def can_mount():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(in_a_namespace("true"), capture_output=True).returncode == 0


def test_a_full_shared_memory_is_an_error_and_no_crash():
    if not can_mount():
        pytest.skip("this machine lets no process mount a /dev/shm of its own")
    command = in_a_namespace(sys.executable, "-c", textwrap.dedent(FULL))
    run = subprocess.run(
        command, env=path_environment(), capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    rank_0, rank_1, llm, size = run.stdout.splitlines()
    assert "ValueError make_shm_transport: /dev/shm must have" in rank_0
    assert "No space left on device" in rank_0
    assert "Enlarge it (docker run --shm-size) or pass a smaller ring_bytes" in rank_0
    assert "TransportError 0 connect rank 0 has not created /dev/shm/moecore.full" in rank_1
    assert "/dev/shm must have" in llm
    assert size == "2"
