"""What is installed: its size, and what of it pip would have to download."""

import io
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
