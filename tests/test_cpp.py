"""The C++ library as a package: who includes whom, what the module needs, and an outside user."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moecore._core

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("cpp", "cuda")
    for path in (ROOT / folder).rglob("*")
    if path.name.endswith((".hpp", ".cpp", ".cu", ".cuh", ".hpp.in"))
)
INCLUDE = re.compile(r"^\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", re.MULTILINE)


def includes(folder):
    """(file, bracket, header) of every #include under `folder`."""
    found = [
        (path.relative_to(ROOT).as_posix(), bracket, header)
        for path in SOURCES
        if path.is_relative_to(ROOT / folder)
        for bracket, header in INCLUDE.findall(path.read_text())
    ]
    assert found, f"no #include under {folder}: did the folder move?"
    return found


def assert_none(found, forbidden):
    lines = [f"{file} includes {header}" for file, _, header in found if forbidden(header)]
    assert not lines, "\n".join(lines)


def test_public_headers_include_only_std_and_moecore():
    for file, bracket, header in includes("cpp/include"):
        if bracket == '"':
            assert header.startswith("moecore/"), f"{file} includes {header}"
        else:  # a standard header has neither a folder nor a suffix
            assert re.fullmatch(r"[a-z_]+", header), f"{file} includes {header}"


def test_only_the_bindings_know_python():
    for folder in ("cpp/include", "cpp/src", "cuda"):
        found = [line for line in includes(folder) if not line[0].startswith("cpp/src/bindings/")]
        assert_none(found, lambda h: h.startswith(("pybind11", "bindings/")) or h == "Python.h")


@pytest.mark.parametrize("folder", ["cpp/src/cpu", "cuda"])
def test_kernels_know_nothing_above_them(folder):
    above = ("ops/", "runtime/", "bindings/")
    layer = ("moecore/workspace.hpp", "moecore/moe_layer.hpp")
    assert_none(includes(folder), lambda h: h.startswith(above) or h in layer)


def test_ops_know_neither_runtime_nor_bindings():
    layer = ("moecore/workspace.hpp", "moecore/moe_layer.hpp")
    assert_none(includes("cpp/src/ops"), lambda h: h.startswith(("runtime/", "bindings/")))
    assert_none(includes("cpp/src/ops"), lambda h: h in layer)


def test_transports_carry_bytes_and_know_no_layer():
    above = ("ops/", "runtime/", "bindings/", "moecore/moe_layer", "moecore/expert_parallel")
    assert_none(includes("cpp/src/transport"), lambda h: h.startswith(above))


def test_only_the_transports_know_each_other_and_nccl():
    for folder in ("cpp/include", "cpp/src", "cuda"):
        found = [line for line in includes(folder) if not line[0].startswith("cpp/src/transport/")]
        found = [line for line in found if not line[0].startswith("cpp/src/bindings/")]
        assert_none(found, lambda h: h.startswith("transport/") or "nccl" in h)


def test_sources_define_no_macros():
    define = re.compile(r"^\s*#\s*define\b.*", re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in SOURCES
        for line in define.findall(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_module_links_neither_torch_nor_cuda():
    output = subprocess.run(
        ["readelf", "-d", moecore._core.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output)
    assert needed
    forbidden = ("libtorch", "libc10", "libcuda", "libcudart", "libnccl")
    assert not [name for name in needed if name.startswith(forbidden)]


def test_import_takes_less_than_200_ms_beyond_torch():
    # Both times from one process: torch is loaded first, then moecore alone. The best of three, so
    # that a busy machine does not count.
    code = (
        "import time, torch; start = time.perf_counter(); import moecore; moecore.LLM, moecore.ops;"
        "print(time.perf_counter() - start)"
    )

    def seconds():
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert min(seconds() for _ in range(3)) < 0.2


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_an_installed_library_serves_an_outside_project(tmp_path):
    """Builds the library, so it takes some twenty seconds."""

    def run(*command):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def build(source, name, *options):
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        folder = str(tmp_path / name)
        run("cmake", "-S", str(source), "-B", folder, *generator, *options)
        run("cmake", "--build", folder, "--parallel", "2")
        return folder

    prefix = tmp_path / "prefix"
    library = build(ROOT, "library", "-DMOECORE_CUDA=OFF", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    run("cmake", "--install", library)
    consumer = ROOT / "tests/cpp/consumer"
    folder = build(consumer, "consumer", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert run(f"{folder}/consumer").startswith("moecore ")
