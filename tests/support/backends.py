"""Devices made of host memory: one that is synchronous, and one whose streams run as late as they may.

The late one queues every torch call that touches its memory, in order, and runs it when a mark requires it or, with a
seed, at any earlier time that the marks allow. Code that lacks a wait then computes with wrong bytes.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ema_server.compute.backend import Mark
from ema_server.compute.memory import HostMemory, allocate
from ema_server.compute.upload import Copiers

_CPU = torch.device("cpu")


class InlineBackend:
    """A device that is the host: nothing is queued and nothing needs a wait."""

    device = _CPU

    def __init__(self, room_bytes: int = 1 << 40) -> None:
        self.room_bytes = room_bytes
        self.trimmed = 0

    def stream(self) -> InlineBackend:
        return self

    def current(self) -> nullcontext[None]:
        return nullcontext()

    def mark(self) -> InlineBackend:
        return self

    def hold(self) -> None:
        """Nothing is queued."""

    def wait(self) -> None:
        """Nothing is queued."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.room_bytes -= nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)

    def host(self, nbytes: int) -> HostMemory:
        return allocate(nbytes)

    def free_bytes(self) -> int:
        return self.room_bytes

    def trim(self) -> None:
        self.trimmed += 1

    def describe(self) -> str:
        return "host memory"


class LateBackend(InlineBackend):
    """A device whose work runs late.

    Args:
        seed: None runs work only when it is required; a number runs some of it earlier, at random.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.chance = None if seed is None else random.Random(seed)
        self.lock = threading.RLock()
        self.streams: list[LateStream] = []
        self.late = 0
        self.moves = 0
        self._memories: list[torch.Tensor] = []  # kept, so that no address is reused

    def stream(self) -> LateStream:  # type: ignore[override]
        with self.lock:
            self.streams.append(LateStream(self))
            return self.streams[-1]

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.room_bytes -= nbytes
        self._memories.append(torch.full((nbytes,), 0xEE, dtype=torch.uint8))
        return self._memories[-1].zero_()

    def is_mine(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in this device's memory."""
        at = tensor.untyped_storage().data_ptr()
        return any(memory.untyped_storage().data_ptr() == at for memory in self._memories)

    def lag(self) -> None:
        """Run some streams at random."""
        while self.chance is not None and self.chance.random() < 0.5:
            self.chance.choice(self.streams).advance()


class LateStream:
    def __init__(self, backend: LateBackend) -> None:
        self.backend = backend
        self.queued = 0
        self.done = 0
        self._work: deque[Callable[[], None]] = deque()

    @contextmanager
    def current(self) -> Iterator[None]:
        before = getattr(_thread, "stream", None)
        _thread.stream = self
        try:
            with _Queueing(self):
                yield
        finally:
            _thread.stream = before

    def mark(self) -> LateMark:
        return LateMark(self, self.queued)

    def queue(self, work: Callable[[], None]) -> None:
        with self.backend.lock:
            self._work.append(work)
            self.queued += 1
            self.backend.late += 1
            self.backend.lag()

    def advance(self) -> None:
        """Run the oldest call."""
        if self._work:
            self._work.popleft()()
            self.done += 1

    def reach(self, place: int) -> None:
        with self.backend.lock:
            while self.done < place:
                self.advance()


class LateMark:
    def __init__(self, stream: LateStream, place: int) -> None:
        self._stream, self._place = stream, place

    def hold(self) -> None:
        """Queued like any work: the waiting stream first runs the other one up to the mark."""
        _thread.stream.queue(self.wait)

    def wait(self) -> None:
        self._stream.reach(self._place)


class _Queueing(TorchDispatchMode):
    """Queues calls that touch the device's memory, except views of it."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {} if kwargs is None else kwargs
        tensors = [value for value in (*args, *named.values()) if isinstance(value, torch.Tensor)]
        if not func._schema.is_mutable or not any(map(self._stream.backend.is_mine, tensors)):
            return func(*args, **named)

        if func is torch.ops.aten.copy_.default and not self._stream.backend.is_mine(args[1]):
            self._stream.backend.moves += 1

        def work() -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                func(*args, **named)

        self._stream.queue(work)
        return args[0]


class LateCopiers(Copiers):
    """Copies each part when it is waited for."""

    def __init__(self) -> None:
        super().__init__(3)
        self.parts: list[LatePart] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark, nbytes_max: int) -> list[Future[None]]:
        def work() -> None:
            after.wait()
            target[: len(source)].copy_(source)

        self.parts.append(LatePart(work))
        return [self.parts[-1]]


class LatePart(Future[None]):
    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> None:
        if not self.done():
            self._work()
            self.set_result(None)

    def exception(self, timeout: float | None = None) -> None:
        self.result()


_thread: Any = threading.local()
