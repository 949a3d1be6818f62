"""Threads that share one pass over all averages of a run. Segments come in; when a call returns, the pass is over.

Each thread takes the next block when it is done with its last, and computes with one thread of torch's own. Torch's
pool would split every block and wait for the slowest part of each: beside processes that keep all cores busy that made
a pass over 87 million elements 20 times as long (1.4 s instead of 0.07 s).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ema_server.kernel import BlockSink, Kernel, Target, show
from ema_server.layout import Form, Segment, cut

# 2 MiB of float32: a block's work dwarfs the Python around it, and the block stays in cache for all averages.
BLOCK_ELEMENTS = 512 << 10

WORKERS_MAX = 8  # memory is saturated by then, and Python's lock is not


class Crew:
    """A pool of kernels.

    Args:
        workers: threads that share a pass, at least 1.
        block_elements: what one thread takes at a time.
    """

    def __init__(self, workers: int, block_elements: int = BLOCK_ELEMENTS) -> None:
        self._block_elements = block_elements
        self._kernels = tuple(Kernel(block_elements) for _ in range(workers))
        self._pool = ThreadPoolExecutor(workers, "averaging", initializer=torch.set_num_threads, initargs=(1,))

    def update(
        self, segments: Sequence[Segment], snapshot: torch.Tensor, targets: Sequence[Target], sink: BlockSink | None
    ) -> None:
        """Bring the whole snapshot into every target; see `Kernel.update`."""
        self._share(segments, lambda kernel, blocks: kernel.update(blocks, snapshot, targets, sink))

    def write(self, segments: Sequence[Segment], forms: Sequence[Form], sink: BlockSink) -> None:
        """Show every block of every average to `sink` and change nothing."""
        self._share(segments, lambda _, blocks: show(blocks, forms, sink))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _share(self, segments: Sequence[Segment], work: Callable[[Kernel, Iterator[Segment]], None]) -> None:
        blocks = _Shared(cut(segments, self._block_elements))
        for done in [self._pool.submit(work, kernel, blocks) for kernel in self._kernels]:
            done.result()


class _Shared(Iterator[Segment]):
    """One iterator for several threads."""

    def __init__(self, blocks: Iterator[Segment]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()

    def __next__(self) -> Segment:
        with self._lock:
            return next(self._blocks)
