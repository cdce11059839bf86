"""What is installed: its size, and what of it pip would have to download."""

import ast
import importlib.metadata
import io
import re
import sys
import zipfile
from pathlib import Path

import moecore


def test_the_wheel_without_model_weights_is_below_10_mb():
    # An installed package holds what its wheel held, and a wheel is a zip file. Bundled weights
    # are the only part that may be larger.
    folder = Path(moecore.__file__).parent
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".safetensors")
    ]
    assert any(path.name.startswith("_core") for path in files)
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.relative_to(folder))
    assert wheel.tell() < 10e6


def imported(path):
    """Names of the packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def dependencies():
    """Names of the packages that pip installs with moecore, as they are imported."""
    requirements = importlib.metadata.requires("moecore") or []
    needed = (re.split(r"[^\w-]", text)[0] for text in requirements if "extra ==" not in text)
    return {name.replace("-", "_") for name in needed}


def test_nothing_is_imported_that_is_not_installed_with_it():
    known = {*sys.stdlib_module_names, "moecore", *dependencies()}
    folder = Path(moecore.__file__).parent
    strangers = {
        (path.relative_to(folder).parts[0], name)
        for path in folder.rglob("*.py")
        for name in imported(path)
        if name not in known
    }
    assert strangers == {("integrations", "transformers")}
