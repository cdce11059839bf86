"""Jobs of a load plan, read and loaded on several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from moecore import _core
from moecore.load_plan import Job
from moecore.safetensors_header import format_error

_BUFFER_BYTES = 96 << 20  # of all threads
_CHUNK_BYTES = 8 << 20  # what a thread takes at a time


class WeightStream:
    """Loads jobs through buffers that are read into and used again.

    Reading into a warm buffer measures faster than touching the pages of a mapped file, and leaves
    nothing mapped.
    """

    def __init__(self, folder: Path, num_threads: int, done: Callable[[int], object]) -> None:
        self._folder = folder
        self._num_threads = num_threads
        self._done = done
        self._large = torch.empty(0, dtype=torch.uint8)

    def run(self, jobs: list[Job]) -> None:
        """Load every job; the first exception stops it and is raised."""
        limit = _BUFFER_BYTES // self._num_threads
        sizes = [job.staged_bytes for job in jobs if job.staged_bytes <= limit]
        buffers: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(self._num_threads):
            buffers.put(torch.empty(max(sizes, default=0), dtype=torch.uint8))
        running: set[Future[int]] = set()

        def drain(most: int) -> None:
            while len(running) > most:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.remove(future)
                    self._done(future.result())

        with _threads(self._num_threads) as (pool, on_all_threads):
            for batch in _batches(jobs, min(limit, _CHUNK_BYTES)):
                if batch[0].staged_bytes > limit:
                    drain(0)
                    with on_all_threads():
                        self._load_large(batch[0], pool)
                    self._done(batch[0].nbytes)
                else:
                    running.add(pool.submit(self._load_batch, batch, buffers))
                    drain(2 * self._num_threads)
            drain(0)

    def _load_batch(self, batch: list[Job], buffers: SimpleQueue[Tensor]) -> int:
        """Load jobs one after another, on the calling thread."""
        buffer = buffers.get()
        try:
            for job in batch:
                memory = buffer.numpy().data
                for piece in job.pieces:
                    self._read(piece.file, piece.offset, memory[piece.place :][: piece.nbytes])
                job.slot.load(*_tensors(job, buffer))
        finally:
            buffers.put(buffer)
        return sum(job.nbytes for job in batch)

    def _load_large(self, job: Job, pool: ThreadPoolExecutor) -> None:
        """Read the parts of one job on all threads, then load it with all of them."""
        if self._large.numel() < job.staged_bytes:
            del self._large  # before its successor exists
            self._large = torch.empty(job.staged_bytes, dtype=torch.uint8)
        memory = self._large.numpy().data
        reads = [
            pool.submit(
                self._read,
                piece.file,
                piece.offset + begin,
                memory[piece.place :][begin : min(begin + _CHUNK_BYTES, piece.nbytes)],
            )
            for piece in job.pieces
            for begin in range(0, piece.nbytes, _CHUNK_BYTES)
        ]
        for read in reads:
            read.result()
        job.slot.load(*_tensors(job, self._large))

    def _read(self, file: str, offset: int, target: memoryview) -> None:
        path = self._folder / file
        with path.open("rb", buffering=0) as handle:
            handle.seek(offset)
            while target:
                count = handle.readinto(target)
                if not count:
                    expected = f"{len(target)} more bytes, as its header says"
                    raise format_error("data", path, expected, "the end of the file")
                target = target[count:]


@contextmanager
def _threads(
    num_threads: int,
) -> Iterator[tuple[ThreadPoolExecutor, Callable[[], AbstractContextManager[None]]]]:
    """A pool whose threads share the cores, and a context in which the caller has them all.

    Teams of threads under each thread of the pool would only wait for each other.
    """
    torch_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
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
        if batch and size + job.staged_bytes > limit:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.staged_bytes
    if batch:
        yield batch


def _tensors(job: Job, buffer: Tensor) -> list[Tensor]:
    return [
        buffer[piece.place : piece.place + piece.nbytes]
        .view(piece.dtype)
        .view(piece.shape)
        .to(job.dtype)
        for piece in job.pieces
    ]
