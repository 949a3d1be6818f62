"""The threads that share one pass over all averages of a run.

Each thread takes the next block when it is done with its last one, and computes with one thread of torch's own. Torch's
pool would split every block and wait for the slowest part of each: beside processes that keep all cores busy, a pass
over 87 million elements took 20 times as long (1.4 s instead of 0.07 s).

A pass that is shorter than waking the threads is done by the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ema_server.compute.arithmetic import BY_TORCH, Arithmetic
from ema_server.compute.device import BLOCK_ELEMENTS, HOST, Device, Feed
from ema_server.compute.kernel import BlockSink, Kernel, Move, Target, show
from ema_server.tensors.finite import FiniteCheck
from ema_server.tensors.layout import Form, Segment, cut

INLINE_BYTES = 1 << 20  # of a snapshot: a pass over them takes about as long as waking two threads
_CHECKED_BYTES = 4 << 20  # a multiple of 8; long enough to dwarf the Python around it

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class _Worker:
    kernel: Kernel
    feed: Feed


class WorkerPool:
    """A kernel for each of `workers` threads, which takes `block_elements` elements at a time.

    One thread at a time may use it, and another one inside the context `waiting`, which is entered while the caller
    waits for the pool's threads. Where averages are in host memory, the caller makes a pass over at most `INLINE_BYTES`
    of a snapshot itself, and any pass while the threads are busy, with as many of torch's threads as it has set.
    """

    def __init__(
        self,
        workers: int,
        block_elements: int = BLOCK_ELEMENTS,
        device: Device = HOST,
        arithmetic: Arithmetic = BY_TORCH,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._block_elements = block_elements
        self._arithmetic = arithmetic
        self._can_address = device.torch_device.type == "cpu"

        def worker() -> _Worker:
            return _Worker(Kernel(block_elements, device.torch_device, arithmetic), device.feed(block_elements))

        self._workers = tuple(worker() for _ in range(workers))
        self._callers = worker() if self._can_address else None
        self._waiting = waiting
        self._is_busy = False
        self._pool = _threads(workers, "averaging")
        # One thread queues a pass on a device of its own. It takes several to read a snapshot as fast as memory is.
        self._readers = self._pool if self._can_address else _threads(HOST.workers, "checking")
        self._readers_count = workers if self._can_address else HOST.workers

    def update(
        self, segments: Sequence[Segment], snapshot: torch.Tensor, targets: Sequence[Target], sink: BlockSink | None
    ) -> None:
        """Apply the segments of a snapshot (uint8, 1-D, in host memory) to every target, as `Kernel.update` does."""

        def update(worker: _Worker, blocks: Iterator[Segment]) -> None:
            with worker.feed.turn():
                worker.kernel.update(worker.feed.blocks(snapshot, blocks), targets, sink)

        self._share(cut(segments, self._block_elements), update, len(snapshot))

    @property
    def has_callers_worker(self) -> bool:
        """Whether the caller makes some passes itself."""
        return self._callers is not None

    @property
    def can_move(self) -> bool:
        """Whether `move` costs no more than `update`. It is not called otherwise."""
        return self._can_address and self._arithmetic.can_move

    def move(
        self,
        segments: Sequence[Segment],
        snapshot: torch.Tensor,
        moves: Sequence[Move],
        check: FiniteCheck,
        sink: BlockSink | None,
    ) -> bool:
        """Write every target, updated, to where it moves, as `Kernel.move` does; returns whether all blocks are finite.

        If it is not, the pass ends early, and what was written is of no use.
        """
        unclean = threading.Event()

        def move(worker: _Worker, blocks: Iterator[Segment]) -> None:
            for block in blocks:
                if unclean.is_set():
                    return
                if not worker.kernel.move(block, snapshot, moves, check, sink):
                    unclean.set()

        self._share(cut(segments, self._block_elements), move, len(snapshot))
        return not unclean.is_set()

    def write(self, segments: Sequence[Segment], forms: Sequence[Form], sink: BlockSink) -> None:
        """Show every block of every average to `sink` without a change."""
        nbytes = segments[-1].wire_end if segments else 0
        self._share(cut(segments, self._block_elements), lambda _, blocks: show(blocks, forms, sink), nbytes)

    def not_finite(self, check: FiniteCheck, snapshot: torch.Tensor) -> tuple[str, ...]:
        """Names of the checked tensors with NaN or Inf in a snapshot (uint8, 1-D, in host memory), sorted."""
        found: set[str] = set()

        def look(_: _Worker, offsets: Iterator[int]) -> None:
            for offset in offsets:
                found.update(check.check(offset, snapshot[offset : offset + _CHECKED_BYTES]))

        threads = self._readers, self._workers[:1] * self._readers_count  # what each is given is not used
        self._share(range(0, len(snapshot), _CHECKED_BYTES), look, len(snapshot), threads)
        return tuple(sorted(found))

    def close(self) -> None:
        self._pool.shutdown()
        self._readers.shutdown()

    def _share(
        self,
        items: Iterable[_Item],
        work: Callable[[_Worker, Iterator[_Item]], None],
        nbytes: int,
        threads: tuple[ThreadPoolExecutor, Sequence[_Worker]] | None = None,
    ) -> None:
        if self._callers is not None and (self._is_busy or nbytes <= INLINE_BYTES):
            work(self._callers, iter(items))
            return
        shared = _Shared(iter(items))
        self._is_busy = True
        pool, workers = threads or (self._pool, self._workers)
        passes = [pool.submit(work, worker, shared) for worker in workers]
        with self._waiting():
            wait(passes)  # all of them, even if one fails: the caller may use the memory for something else afterwards
        self._is_busy = False
        for done in passes:
            done.result()


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads that each compute with one thread of torch's."""
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


class _Shared(Generic[_Item], Iterator[_Item]):
    """One iterator for several threads."""

    def __init__(self, items: Iterator[_Item]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def __next__(self) -> _Item:
        with self._lock:
            return next(self._items)
