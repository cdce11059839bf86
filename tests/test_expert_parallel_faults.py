"""Ranks that fail, stop and die: an error that names them, in time, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import moecore
from moecore import LLM, FormatError, SamplingParams, TransportError
from moecore.expert_parallel import members
from moecore.hub import resolve_model

TIMEOUT = 2.0
LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0)
PROMPTS = ["Once upon a time", "The king", "In the dark wood"]


@pytest.fixture(autouse=True)
def heeded_ctrl_c():
    """Python heeds Ctrl-C, also in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def started(monkeypatch):
    """Processes that are started; afterwards all must have ended, and left no shared memory."""
    processes = []
    start = members._start_process

    def recorded(*args):
        processes.append(start(*args))
        return processes[-1]

    monkeypatch.setattr(members, "_start_process", recorded)
    threads = our_threads()
    yield processes
    assert processes
    assert all(process.poll() is not None for process in processes)
    assert shared_memory() == []
    assert our_threads() == threads


def our_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("moecore-")}


def shared_memory(process=None):
    return list(Path("/dev/shm").glob(f"moecore.{process or os.getpid()}-*"))


def make_faulty(monkeypatch, how):
    monkeypatch.setattr(members, "_PROGRAM", [str(Path(__file__).with_name("faulty_rank.py")), how])


def make_llm(size=2, timeout=TIMEOUT, **options):
    return LLM(
        device="cpu",
        expert_parallel_size=size,
        expert_parallel_timeout=timeout,
        use_tqdm=False,
        **options,
    )


def generate(llm):
    return llm.generate(PROMPTS, LONG, use_tqdm=False)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            "fails in a pass",
            RuntimeError,
            r"OutOfMemoryError: no memory for the keys(?s:.*)raised on rank 1 .* in pass 3",
        ),
        ("is killed in a pass", TransportError, "rank 1 was ended by SIGKILL .* in pass 3; "),
        ("stops in a pass", TransportError, "rank 1 .*2 s"),
        (
            "stops after its pass",
            TransportError,
            "rank 1 has been silent for 2 s.* in pass 3; ",
        ),
    ],
)
def test_a_rank_that_is_lost_in_a_pass_is_named_in_time(how, error, message, started, monkeypatch):
    make_faulty(monkeypatch, how)
    with make_llm() as llm:
        begin = time.monotonic()
        with pytest.raises(error, match=message) as raised:
            generate(llm)
        # Silence is judged after the timeout; then ranks have a second each to say why, and to end.
        assert time.monotonic() - begin < 3 * TIMEOUT
        if error is TransportError:
            assert raised.value.rank == 1
            assert raised.value.phase
        assert all(process.poll() is not None for process in started)
        with pytest.raises(RuntimeError, match="the ranks have ended .* make a new LLM"):
            generate(llm)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("fails to load", RuntimeError, "no memory .*\n.*rank 1 .* while it loaded the model"),
        (
            "exits before loading",
            TransportError,
            "rank 1 has exited with status 3.*while",
        ),
        (
            "stops at once",
            TransportError,
            "rank 1 .* for 2 s: it is stopped .*started",
        ),
        ("stops before loading", TransportError, "rank 1 has been silent for 2 s.*while the ranks"),
    ],
)
def test_a_rank_that_cannot_load_is_named_in_time(how, error, message, started, monkeypatch):
    make_faulty(monkeypatch, how)
    with pytest.raises(error, match=message):
        make_llm()


@pytest.mark.parametrize("damage", ["cut", "other weights"])
def test_a_rank_with_other_files_is_named(damage, started, monkeypatch, tmp_path):
    folder = shutil.copytree(resolve_model(None), tmp_path / "model")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    kept = len(weights) - 1000 if damage == "cut" else len(weights)
    (folder / "model.safetensors").write_bytes(weights[:kept])
    make_faulty(monkeypatch, f"has another model: {folder}")
    error, message = {
        "cut": (FormatError, "expected .*found(?s:.*)raised on rank 1 .* read the model"),
        "other weights": (ValueError, "model weights must be the same on every rank"),
    }[damage]
    with pytest.raises(error, match=message):
        make_llm()


def test_a_rank_that_is_slow_to_load_is_waited_for(started, monkeypatch):
    make_faulty(monkeypatch, "is slow to load")
    with make_llm(timeout=1.0) as llm:
        assert llm.generate("The", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_a_rank_that_dies_between_passes_is_named_by_whatever_comes_next(started):
    with make_llm(size=3) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        started[0].kill()
        started[0].wait()
        time.sleep(0.1)
        with pytest.raises(
            TransportError, match="rank 1 was ended by SIGKILL .*as it got a request"
        ):
            llm.stream(PROMPTS[1], LONG)
        with pytest.raises(RuntimeError, match="request 0 was aborted"):
            next(stream)


def test_a_rank_imports_what_rank_0_does_wherever_that_is(started, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not the torch that was meant')")
    monkeypatch.chdir(tmp_path)
    with make_llm() as llm:
        assert llm.generate("The", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_an_error_on_rank_0_ends_the_others(started, monkeypatch):
    def broken(self, **_):
        raise MemoryError("too large for this test")

    monkeypatch.setattr("moecore.assembly.Assembly.load", broken)
    with pytest.raises(MemoryError, match="too large"):
        make_llm()


def test_a_pass_that_fails_on_rank_0_ends_the_others(started, monkeypatch):
    with make_llm() as llm:
        monkeypatch.setattr(llm.engine._rank._runner._runner, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(llm)
        with pytest.raises(RuntimeError, match="make a new LLM"):
            generate(llm)


def test_ranks_that_are_threads_end_after_an_error_too(monkeypatch):
    from moecore.expert_parallel.rank import GroupRunner

    run = GroupRunner.run

    def faulty(self, batch):
        if threading.current_thread().name == "moecore-rank-2":
            raise OSError("a page could not be read")
        return run(self, batch)

    before = our_threads(), moecore.num_threads(), torch.get_num_threads()
    with make_llm(size=4, expert_parallel_backend="threads") as llm:
        monkeypatch.setattr(GroupRunner, "run", faulty)
        with pytest.raises(OSError, match=r"a page could not be read\n\(raised on rank 2 "):
            generate(llm)
    after = our_threads(), moecore.num_threads(), torch.get_num_threads()
    assert after == before


def generate_until_interrupted(llm):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        generate(llm)


def interrupt_soon():
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_ends_what_runs_and_the_ranks_stay(started):
    with make_llm() as llm:
        want = llm.generate(PROMPTS, SamplingParams(temperature=0), use_tqdm=False)
        timer = interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            generate_until_interrupted(llm)
        timer.join()
        assert not llm.engine.has_unfinished
        got = llm.generate(PROMPTS, SamplingParams(temperature=0), use_tqdm=False)
    assert [r.outputs for r in got] == [r.outputs for r in want]


def test_a_second_ctrl_c_does_not_wait_for_the_pass(started, monkeypatch):
    with make_llm() as llm:
        run = llm.engine._rank._runner._runner.run

        def slow(*args):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return run(*args)

        monkeypatch.setattr(llm.engine._rank._runner._runner, "run", slow)
        with pytest.raises(KeyboardInterrupt):
            generate(llm)
        assert all(process.poll() is not None for process in started)


# --- a program that ends ---

PROGRAM = """
import os, sys, time
from moecore import LLM, SamplingParams
from moecore.expert_parallel import members
start, ids = members._start_process, []
def recorded(*args):
    process = start(*args)
    ids.append(str(process.pid))
    return process
members._start_process = recorded
llm = LLM(device="cpu", expert_parallel_size=2, use_tqdm=False)
stream = llm.stream("Once upon a time", SamplingParams(max_tokens=900, ignore_eos=True))
next(stream)
print(*ids, flush=True)
if sys.argv[1] == "end":
    sys.exit(0)
while True:
    for _ in llm.stream("Once upon a time", SamplingParams(max_tokens=900, ignore_eos=True)):
        pass
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [("end", 0), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["without closing", "Ctrl-C", "SIGKILL"],
)
def test_a_program_that_ends_leaves_no_rank(how, status):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(how)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ranks = [int(process) for process in program.stdout.readline().split()]
    assert len(ranks) == 1
    assert Path(f"/proc/{ranks[0]}").exists() or how == "end"
    if how == signal.SIGINT:
        os.killpg(program.pid, how)  # as a terminal does: every process of the group gets it
    elif how == signal.SIGKILL:
        program.kill()
    _, printed = program.communicate(timeout=30)
    assert program.returncode == status
    assert ("KeyboardInterrupt" in printed) == (how == signal.SIGINT)
    deadline = time.monotonic() + 10
    while is_running(ranks[0]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert shared_memory(program.pid) == []


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
