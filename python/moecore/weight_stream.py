"""Jobs of a load plan, read and loaded on several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from moecore import _core
from moecore.checkpoint import Checkpoint
from moecore.load_plan import Job

_MAPPED_BYTES = 128 << 20  # by all threads together
_LEAST_MAPPED_BYTES = 8 << 20  # a mapping costs 0.1 ms
_READ_BYTES = 128 << 20  # by all threads between two calls of `done`
_TURN = threading.Lock()  # one load at a time has the threads


class WeightStream:
    """Loads jobs: those that pack by reading, the others from mapped files.

    Mapped pages count as memory of the process until their mapping ends, and mapping costs by the
    piece in which the page cache holds the file; reading does neither.
    """

    def __init__(
        self, checkpoint: Checkpoint, num_threads: int, done: Callable[[int], object]
    ) -> None:
        self._checkpoint = checkpoint
        self._num_threads = num_threads
        self._done = done

    def run(self, jobs: list[Job]) -> None:
        """Load every job; the first exception stops it and is raised."""
        with _TURN:
            self._run_packing([job for job in jobs if job.packing is not None])
            self._run_mapped([job for job in jobs if job.packing is None])

    def _run_packing(self, jobs: list[Job]) -> None:
        """A native call for each batch, which hands its pieces out to threads."""
        for batch in _batches(jobs, _READ_BYTES):
            with self._checkpoint.reader() as reader:
                packings = ((*job.packing, job.parts) for job in batch if job.packing is not None)
                reader.pack(packings, self._num_threads)
            self._done(sum(job.nbytes for job in batch))

    def _run_mapped(self, jobs: list[Job]) -> None:
        """A mapping for each batch, which is loaded on one thread of a pool."""
        if not jobs:
            return
        even = sum(job.nbytes for job in jobs) // (4 * self._num_threads)
        limit = min(_MAPPED_BYTES // self._num_threads, max(even, _LEAST_MAPPED_BYTES))
        running: set[Future[int]] = set()

        def drain(most: int) -> None:
            while len(running) > most:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.remove(future)
                    self._done(future.result())

        with _threads(self._num_threads) as (pool, on_all_threads):
            for batch in _batches(jobs, limit):
                if batch[0].nbytes > limit:  # alone, and each of its operations on all threads
                    drain(0)
                    with on_all_threads():
                        self._done(self._load(batch))
                else:
                    running.add(pool.submit(self._load, batch))
                    drain(2 * self._num_threads)
            drain(0)

    def _load(self, batch: list[Job]) -> int:
        with self._checkpoint.reader() as reader:
            for job in batch:
                job.load(*(_aligned(reader.view(part)).to(job.dtype) for part in job.parts))
        return sum(job.nbytes for job in batch)


def _aligned(tensor: Tensor) -> Tensor:
    """Files of early writers are not."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


@contextmanager
def _threads(
    num_threads: int,
) -> Iterator[tuple[ThreadPoolExecutor, Callable[[], AbstractContextManager[None]]]]:
    """A pool whose threads share the cores, and a context in which the caller has them all.

    Teams of threads under each thread of the pool would only wait for each other.
    """
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        torch_threads = torch.get_num_threads()
        # What set_num_threads chose holds on every thread; without it, the pool's threads have 1.
        core_threads = pool.submit(_core.num_threads).result()

        @contextmanager
        def on_all_threads() -> Iterator[None]:
            if core_threads > 1:
                _core.set_num_threads(core_threads)
            try:
                yield
            finally:
                if core_threads > 1:
                    _core.set_num_threads(1)

        try:
            if core_threads > 1:
                _core.set_num_threads(1)
            yield pool, on_all_threads
        finally:
            pool.shutdown(cancel_futures=True)
            if core_threads > 1:
                _core.set_num_threads(core_threads)
            torch.set_num_threads(torch_threads)


def _batches(jobs: list[Job], limit: int) -> Iterator[list[Job]]:
    """Consecutive jobs of at most `limit` bytes together, or one larger job."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        if batch and size + job.nbytes > limit:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.nbytes
    if batch:
        yield batch
