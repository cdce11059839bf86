"""Ranks that a launcher starts: how they meet, and what they say when they cannot."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

import moecore
from moecore import LLM, SamplingParams, UnsupportedError
from moecore.assembly import Assembly, EngineOptions
from moecore.expert_parallel import agreement, launch
from moecore.expert_parallel.environment import Launch
from moecore.expert_parallel.group import are_on_one_machine, cache_shares, thread_shares
from moecore.expert_parallel.rank import device_of_rank, open_transport, wanted_transport
from moecore.expert_parallel.rendezvous import accept_ranks, connect_to_rank_0
from moecore.hub import resolve_model
from processes import python

PROGRAM = """
import sys
from moecore import LLM, SamplingParams
with LLM(sys.argv[1], device="cpu", expert_parallel_size=2, use_tqdm=False) as llm:
    print("made", flush=True)
"""


@pytest.fixture
def place():
    """A group of three at a free port, as rank 0 sees it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return Launch(rank=0, size=3, local_rank=0, address="127.0.0.1", port=port, key="test")


def environment(place, rank, size=2):
    where = {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    return {**os.environ, **where, "RANK": str(rank), "WORLD_SIZE": str(size)}


def test_torchrun_and_the_command_line_give_the_text_of_one_rank_once():
    arguments = ["generate", "Once upon a time", "--json", "--device", "cpu", "--ep", "2"]
    arguments += ["--max-tokens", "12", "--temperature", "0"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = python(*torchrun, "-m", "moecore", *arguments, timeout=120)
    assert launched.returncode == 0, launched.stderr
    ours = python("-m", "moecore", *arguments, timeout=120)
    assert (ours.returncode, ours.stderr) == (0, "")
    with LLM(device="cpu", use_tqdm=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=12)
        [want] = llm.generate("Once upon a time", params, use_tqdm=False)
    for result in (launched, ours):  # one object: the other rank prints nothing
        assert json.loads(result.stdout)["outputs"][0]["text"] == want.outputs[0].text


def test_ranks_with_different_models_all_say_so(place, tmp_path):
    other = shutil.copytree(resolve_model(None), tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, folder],
            env={**environment(place, rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate([resolve_model(None), other])
    ]
    for process in ranks:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
        assert "model configuration must be the same on every rank" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_seqs": 7}, "max_num_seqs must be .* got 64 on rank 0 and 7 on rank 3"),
        ({"dtype": "float32"}, "dtype must be .* got 'bfloat16' on rank 0 and 'float32' on rank 3"),
        ({"seed": 1}, "seed must be .* got 0 on rank 0 and 1 on rank 3"),
        ({"load_format": "dummy"}, "model weights must be .* and 'dummy' on rank 3"),
        ({"cpu_isa": "abacus"}, "instruction set must be .* and 'abacus' on rank 3"),
        ({}, None),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else "",
)
def test_what_differs_between_ranks_is_named(change, message, monkeypatch):
    options = {"model": None, "device": "cpu", "dtype": "auto", "max_model_len": None}
    options |= {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "kv_cache_memory": None}
    options |= {"load_format": "auto", "revision": None, "seed": 0, "skip_tokenizer_init": True}
    options["enforce_eager"] = False
    facts = agreement.facts_of(Assembly(EngineOptions(**options)), 4)
    build = moecore.build_info()
    if "cpu_isa" in change:
        monkeypatch.setattr(agreement._core, "build_info", lambda: build | change)
    changed = {name: value for name, value in change.items() if name in options}
    others = agreement.facts_of(Assembly(EngineOptions(**options | changed)), 4)
    found = agreement.disagreement(facts, json.loads(json.dumps(others)), 3)
    assert found is None if message is None else re.search(f"^LLM: {message}", found)


@pytest.mark.parametrize("size", [2, 4])
def test_the_size_must_be_the_launchers(size, place, monkeypatch):
    for name, value in environment(place, 1, size=3).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"launcher started \(3\), got {size}"):
        LLM(device="cpu", expert_parallel_size=size, use_tqdm=False)


def test_a_launch_serves_one_model(place, monkeypatch):
    for name, value in environment(place, 0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "_is_used_up", True)
    with pytest.raises(RuntimeError, match="serves one expert-parallel model, got a second"):
        LLM(device="cpu", expert_parallel_size=2, use_tqdm=False)


def test_ranks_that_do_not_come_are_named(place):
    with pytest.raises(TimeoutError, match=r"all 3 ranks must .* of rank 1, 2 in 0.2 s"):
        accept_ranks(place, patience=1.0, wait=0.2)


def test_a_rank_0_that_does_not_come_is_named(place):
    other = replace(place, rank=1)
    with pytest.raises(TimeoutError, match=r"rank 0 must come to 127.0.0.1:.* on rank 1 in 1 s"):
        connect_to_rank_0(other, patience=1.0, wait=1)


def test_strangers_are_not_let_in(place):
    met = {}
    waiting = threading.Thread(target=lambda: met.update(accept_ranks(place, 1.0, 20.0)))
    waiting.start()
    channels = [connect_to_rank_0(replace(place, rank=1), 1.0, 20.0)]
    store = PrefixStore("moecore-test", TCPStore(place.address, place.port, is_master=False))
    port = json.loads(store.get("control"))["port"]
    for text in (b"GET / HTTP/1.1\r\n\r\n", b'\x1a\0\0\0\0\0\0\0{"type":"x","token":"no"}  '):
        with socket.create_connection((place.address, port)) as stranger:
            stranger.sendall(text)
    channels.append(connect_to_rank_0(replace(place, rank=2), 1.0, 20.0))
    waiting.join()
    assert sorted(met) == [1, 2]
    for channel in (*channels, *(member.channel for member in met.values())):
        channel.close()


def test_ranks_share_the_processors_that_they_have_in_common():
    def rank(host, cpus, threads, chosen=False):
        return {"host": host, "cpus": cpus, "threads": threads, "threads are chosen": chosen}

    ours = [rank("a", [0, 1, 2, 3, 4], 5)] * 3
    assert thread_shares(ours, are_ours=True) == [2, 2, 1]
    assert thread_shares([rank("a", [0], 1)] * 2, are_ours=True) == [1, 1]
    launched = [
        rank("a", [0, 1, 2, 3], 4),
        rank("a", [0, 1, 2, 3], 4),
        rank("b", [0, 1, 2, 3], 4),
        rank("a", [4, 5], 2),
        rank("c", [0, 1, 2, 3], 3, chosen=True),
        rank("c", [0, 1, 2, 3], 3, chosen=True),
    ]
    assert thread_shares(launched, are_ours=False) == [2, 2, 4, 2, 3, 3]


def test_ranks_on_the_cpu_must_be_on_one_machine():
    def places(device, *hosts):
        return [{"host": host, "device": device} for host in hosts]

    assert are_on_one_machine(places("cpu", "a 1", "a 1"))
    assert not are_on_one_machine(places("cuda:0", "a 1", "b 2"))
    with pytest.raises(UnsupportedError, match="on one machine, got a, b; ranks on several"):
        are_on_one_machine(places("cpu", "b 1", "a 2"))


def test_ranks_of_one_gpu_share_its_free_memory():
    def places(*devices):
        return [{"host": host, "device": device} for host, device in devices]

    assert cache_shares(places(("a", "cpu"), ("a", "cpu"))) == 1
    assert cache_shares(places(("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0"))) == 1
    assert cache_shares(places(("a", "cuda:0"), ("a", "cuda:0"), ("b", "cuda:0"))) == 2


def test_each_rank_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_rank(torch.device("cpu"), 7) == torch.device("cpu")
    assert device_of_rank(torch.device("cuda:0"), 1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"at most the number of GPUs of a machine \(2\).* rank 2"):
        device_of_rank(torch.device("cuda:0"), 2)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert device_of_rank(torch.device("cuda:0"), 3) == torch.device("cuda:1")


def test_a_rank_chooses_no_other_gpu(monkeypatch):
    monkeypatch.setattr(launch, "choose_device", torch.device)
    with pytest.raises(ValueError, match=r"device must be .* CUDA_VISIBLE_DEVICES .*got 'cuda:1'"):
        LLM(device="cuda:1", expert_parallel_size=2, use_tqdm=False)


class RecordedTransports:
    """Stands for Transport: notes what was made, and returns its name."""

    def __init__(self):
        self.made = []

    def shm(self, *given, **named):
        self.made.append(("shm", given, named))
        return "hosts"

    def nccl(self, *given, **named):
        self.made.append(("nccl", given, named))
        return "nccl"

    def peer(self, *given, **named):
        self.made.append(("peer", given, named))
        return "peer"


@pytest.mark.parametrize("hosts", ["run", None])
def test_gpus_meet_over_nccl_which_takes_over_the_transport_of_the_hosts(hosts, monkeypatch):
    recorded = RecordedTransports()
    monkeypatch.setattr("moecore.expert_parallel.rank.Transport", recorded)
    plan = {"hosts": hosts, "unique_id": b"id".hex()}
    gpu = torch.device("cuda:1")
    assert open_transport(plan, 1, 2, gpu, 5.0) == "nccl"
    limits = {"deadline": 5.0, "connect_deadline": 30.0}
    over = [("shm", ("run", 1, 2), limits)] if hosts else []
    taken = "hosts" if hosts else None
    joined = ("nccl", (b"id", 1, 2), {"device": gpu, "hosts": taken, **limits})
    assert recorded.made == [*over, joined]


def test_gpus_of_one_machine_copy_from_each_other_where_that_is_asked_for(monkeypatch):
    recorded = RecordedTransports()
    monkeypatch.setattr("moecore.expert_parallel.rank.Transport", recorded)
    gpu = torch.device("cuda:1")
    assert open_transport({"hosts": "run", "unique_id": None}, 1, 2, gpu, 5.0) == "peer"
    assert recorded.made[1:] == [("peer", ("hosts",), {"device": gpu, "deadline": 5.0})]


def test_gpus_write_to_each_other_where_all_can(monkeypatch):
    reachable = {(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda *pair: pair in reachable)
    assert wanted_transport(True, 3) == "peer"
    assert wanted_transport(True, 4) == "nccl"
    assert wanted_transport(False, 3) == "nccl"
    reachable.discard((2, 0))
    assert wanted_transport(True, 3) == "nccl"


def test_the_environment_says_how_gpus_meet(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda *pair: False)
    monkeypatch.setenv("MOECORE_TRANSPORT", "peer")
    assert wanted_transport(True, 2) == "peer"
    with pytest.raises(ValueError, match="must be nccl between machines, got 'peer'"):
        wanted_transport(False, 2)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda *pair: True)
    monkeypatch.setenv("MOECORE_TRANSPORT", "nccl")
    assert wanted_transport(True, 2) == "nccl"
    monkeypatch.setenv("MOECORE_TRANSPORT", "rdma")
    with pytest.raises(ValueError, match="MOECORE_TRANSPORT must be auto, nccl or peer, got 'rdma"):
        wanted_transport(True, 2)
