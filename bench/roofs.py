"""Roofs of this machine, measured by the C++ benchmarks' own code.

Build it once:
    cmake -S . -B build-bench -DMOECORE_BENCH=ON && cmake --build build-bench
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

DEFAULT = Path(__file__).parent.parent / "build-bench" / "bench" / "libmoecore_roofs.so"


class Roofs:
    """Read bandwidth and multiply-add rate, on `threads` threads."""

    def __init__(self, path: Path = DEFAULT, threads: int = 2) -> None:
        if not path.is_file():
            sys.exit(f"{path}: no such file; {__doc__.strip().splitlines()[-1]}")
        self._library = ctypes.CDLL(str(path))
        self._library.moecore_read_gbps.restype = ctypes.c_double
        self._library.moecore_matmul_gflops.restype = ctypes.c_double
        self._library.moecore_set_threads(threads)
        self.read_gbps()  # the first call allocates

    def read_gbps(self) -> float:
        return float(self._library.moecore_read_gbps())

    def matmul_gflops(self) -> float:
        return float(self._library.moecore_matmul_gflops())
