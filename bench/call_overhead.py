"""Microseconds of one call into the core with three tensors, almost no arithmetic behind it.

python bench/call_overhead.py
"""

from __future__ import annotations

import statistics
import time

import torch

import moecore
from moecore import _core
from moecore.ops import GroupedGemmConfig

CALLS = 20_000


def main() -> None:
    moecore.set_num_threads(1)
    x, weight, out = torch.ones(1, 1), torch.ones(1, 1), torch.empty(1, 1)
    config = GroupedGemmConfig()
    samples = []
    for _ in range(15):
        begin = time.perf_counter()
        for _ in range(CALLS):
            _core.linear(x, weight, None, config, out)
        samples.append((time.perf_counter() - begin) / CALLS * 1e6)
    print(f"linear of one element, three tensors: {statistics.median(samples):.2f} us a call")


if __name__ == "__main__":
    main()
