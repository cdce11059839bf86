"""`moecore doctor`: what each check finds, and what it advises."""

import json

import pytest

from moecore.cli import checks, main
from processes import python
from test_package import dependencies


def by_name():
    return {check.name: check for check in checks.run_checks()}


def test_doctor_finds_this_machine(capsys):
    import torch

    import moecore

    code = main(["doctor", "--json"])
    result = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in result["checks"]}
    assert found["torch"]["facts"]["version"] == torch.__version__
    assert found["build"]["facts"] == moecore.build_info()
    assert found["threads"]["facts"]["threads"] == moecore.num_threads()
    assert len(found["GPUs"]["facts"]["gpus"]) == torch.cuda.device_count()
    assert found["OpenMP"]["facts"]["libraries"]
    assert found["memory"]["facts"]["total"] > 2**28
    problems = [check for check in result["checks"] if check["status"] == "problem"]
    assert (code, result["ok"]) == (1 if problems else 0, not problems)
    assert all(check["advice"] for check in problems)


def test_doctor_shows_every_check_and_its_advice(monkeypatch, capsys):
    findings = [
        checks.Check("first", "ok", "fine"),
        checks.Check("second", "problem", "[broken] " + "x" * 200, "mend it"),
    ]
    monkeypatch.setattr(checks, "run_checks", lambda: findings)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["ok", "first", "fine"]
    assert out[1].endswith("[broken] " + "x" * 200)
    assert out[2].strip() == "-> mend it"
    monkeypatch.setattr(checks, "run_checks", lambda: findings[:1])
    assert main(["doctor"]) == 0


def test_doctor_reports_a_check_that_fails(monkeypatch):
    def broken(name):
        raise OSError("libtorch is cut")

    monkeypatch.setitem(checks._CHECKS, "torch", broken)
    check = by_name()["torch"]
    assert (check.status, check.detail) == ("problem", "OSError: libtorch is cut")
    assert check.advice == "pip install 'torch>=2.10'"


def test_doctor_refuses_an_old_torch(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    assert by_name()["torch"].status == "problem"


def test_doctor_sees_too_many_and_too_few_threads(monkeypatch):
    import moecore

    monkeypatch.setattr(checks, "_usable_cpus", lambda: 2.0)
    for threads, status, advice in [(4, "note", "=2"), (1, "note", "=2"), (2, "ok", None)]:
        monkeypatch.setattr(moecore, "num_threads", lambda n=threads: n)
        check = by_name()["threads"]
        assert check.status == status
        assert check.advice is None if advice is None else check.advice.count(advice) == 1


@pytest.mark.parametrize(
    ("gpus", "kernels", "status"), [(1, True, "ok"), (1, False, "note"), (0, False, "ok")]
)
def test_doctor_judges_gpus_and_kernels_together(monkeypatch, gpus, kernels, status):
    import types

    import torch

    import moecore

    card = types.SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)
    info = {**moecore.build_info(), "has_cuda": kernels}
    monkeypatch.setattr(checks, "_build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(checks, "Path", lambda path: types.SimpleNamespace(exists=lambda: False))
    check = checks._gpus("GPUs")
    assert check.status == status
    assert ("MOECORE_CUDA=ON" in (check.advice or "")) == (status == "note")
    if gpus:
        assert "H100, 80 GiB, sm 9.0" in check.detail


def test_doctor_finds_nccl_in_the_order_it_is_tried(monkeypatch, tmp_path):
    library = tmp_path / "libnccl.so.2"
    monkeypatch.setattr(checks, "_mapped", lambda pattern: ["/loaded/libnccl.so.2"])
    monkeypatch.setattr(checks, "_nccl_of_wheels", lambda: ["/wheel/libnccl.so.2"])
    monkeypatch.delenv("MOECORE_NCCL", raising=False)
    assert checks._nccl("NCCL").detail == "/loaded/libnccl.so.2 (loaded in this process)"
    monkeypatch.setattr(checks, "_mapped", lambda pattern: [])
    assert checks._nccl("NCCL").detail == "/wheel/libnccl.so.2 (nvidia-nccl wheel)"
    monkeypatch.setenv("MOECORE_NCCL", str(library))
    check = checks._nccl("NCCL")
    assert (check.status, check.detail) == ("problem", f"MOECORE_NCCL names no file: {library}")
    library.touch()
    assert checks._nccl("NCCL").detail == f"{library} (MOECORE_NCCL)"


def test_doctor_sees_a_forced_instruction_set():
    result = python("-m", "moecore", "doctor", "--json", timeout=60)
    supported = next(
        check["facts"]["supported"]
        for check in json.loads(result.stdout)["checks"]
        if check["name"] == "instruction set"
    )
    if len(supported) == 1:
        pytest.skip("this processor has one instruction set")
    program = (
        "import os; os.environ['MOECORE_CPU_ISA'] = 'scalar'\n"
        "from moecore.cli.checks import _instruction_set as check\n"
        "print(check('x').status, check('x').advice)\n"
    )
    out = python("-c", program).stdout
    assert out == f"note MOECORE_CPU_ISA holds it back: unset it to use {supported[-1]}\n"


def test_doctor_says_why_an_instruction_set_is_denied(monkeypatch):
    import moecore

    info = moecore.build_info()
    info = {**info, "cpu_isa": info["cpu_isas"][-1], "cpu_isa_denied": "amx: refused"}
    monkeypatch.setattr(checks, "_build_info", lambda: info)
    check = checks._instruction_set("instruction set")
    assert check.status == "note"
    assert check.detail.endswith("; without amx: refused")
    assert "allow it" in check.advice


def test_doctor_misses_files_of_the_bundled_model(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    (tmp_path / "bundled").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / "bundled" / file).touch()
    check = checks._bundled_model("bundled model")
    assert check.status == "problem"
    assert check.detail.endswith("bundled lacks model.safetensors")
    (tmp_path / "bundled" / "model.safetensors").touch()
    assert checks._bundled_model("bundled model").status == "ok"


def test_doctor_looks_for_what_the_package_depends_on():
    assert {*checks._PACKAGES, "torch"} == dependencies()


def test_doctor_misses_packages(monkeypatch):
    monkeypatch.setattr(checks, "_PACKAGES", ("rich", "no-such-package"))
    check = checks._packages("packages")
    assert (check.status, check.advice) == ("problem", "pip install no-such-package")


@pytest.mark.parametrize(
    ("free", "environment", "status", "detail"),
    [
        (1 << 30, {}, "ok", "up to 2 ranks on the CPU, 1024 MiB in /dev/shm"),
        (1 << 20, {}, "note", "1 MiB in /dev/shm"),
        (1 << 30, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "problem", "MASTER_PORT"),
        (
            1 << 30,
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "ok",
            "started as rank 1 of 2",
        ),
    ],
)
def test_doctor_says_what_ranks_need(monkeypatch, free, environment, status, detail):
    import shutil
    import types

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(checks, "_usable_cpus", lambda: 2.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    check = by_name()["expert parallelism"]
    assert check.status == status
    assert detail in check.detail
    assert bool(check.advice) == (status != "ok")
    assert check.facts["shared_memory_free"] == free
