"""An accelerator with a simulated clock: work issued to a stream runs when the clock advances.

Its memory is the host's, so that tests can read it. A kernel takes effect when it ends; a copy between device and slot
takes time in proportion to its bytes, tensor by tensor. Waiting threads do not advance the clock, except the one that
made the device: when it blocks, the clock advances until the condition it waits for holds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BYTES_PER_S = 3e7  # from the device to a slot
KERNEL_S = 1e-9  # of a copy within the device
_PATIENCE_S = 30.0


@dataclass(eq=False)
class _Point:
    """A point in a stream, which the clock has reached or not."""

    reached_at: float | None = None


@dataclass(eq=False)
class _Work:
    duration_s: float
    effect: Callable[[], None]
    after: _Point | None
    issued_at: float


@dataclass(eq=False)
class FakeStream:
    """Runs its work in order."""

    device: FakeDevice
    now: float = 0.0
    work: deque[_Work] = field(default_factory=deque)

    def add(self, duration_s: float, effect: Callable[[], None], after: _Point | None = None) -> None:
        """Issue work of this duration, which begins when `after` is reached."""
        with self.device.changed:
            self.work.append(_Work(duration_s, effect, after, self.device.now))

    def synchronize(self) -> None:
        """Block until all of it is done."""
        point = _Point()
        self.add(0.0, lambda: self.device.reach(point, self))
        self.device.block_at(point)


class FakeEvent:
    """Follows the rules of CUDA events: a wait for an unrecorded event returns at once."""

    def __init__(self) -> None:
        self.point: _Point | None = None

    def record(self, stream: FakeStream) -> None:
        """Record the work issued to `stream` so far."""
        point = self.point = _Point()
        stream.add(0.0, lambda: stream.device.reach(point, stream))

    def wait(self, stream: FakeStream) -> None:
        """Make `stream` wait for this event."""
        if self.point is not None:
            stream.add(0.0, lambda: None, after=self.point)


class FakeDevice:
    """One device; see `trainer_client.staging.device.Device`. `advance` moves the clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.changed = threading.Condition()
        self.capturing = False
        self.pin_problem: str | None = None
        self.pinned: list[int] = []
        self.copied: list[tuple[Tensor, Tensor]] = []
        self.allocated: list[int] = []
        self.hosts = 0
        self.fail_after: int | None = None
        self.room: float = float("inf")  # bytes of its memory that are free
        self._owner = threading.get_ident()
        self._streams: list[FakeStream] = []
        self._memory: list[Tensor] = []
        self._here = threading.local()
        self.compute = self.new_stream()

    def current_stream(self) -> FakeStream:
        """The calling thread's; at first the compute stream."""
        stream: FakeStream = getattr(self._here, "stream", self.compute)
        return stream

    def new_stream(self) -> FakeStream:
        """A new stream."""
        self._streams.append(FakeStream(self))
        return self._streams[-1]

    def new_event(self) -> FakeEvent:
        """A new event, not recorded yet."""
        return FakeEvent()

    @contextmanager
    def issue_to(self, stream: FakeStream) -> Iterator[None]:
        """Make `stream` the calling thread's."""
        before = self.current_stream()
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """A copy to a slot takes time in proportion to its bytes, one within the device takes none."""
        for target, source in zip(targets, sources, strict=True):
            if self.fail_after is not None:
                self.fail_after -= 1
                if self.fail_after < 0:
                    raise RuntimeError("the device is broken")
            assert (target.dtype, target.shape) == (source.dtype, source.shape)
            inside = any(_inside(target, memory) for memory in self._memory)
            assert inside or (target.is_contiguous() and source.is_contiguous()), "this copy would allocate"
            self.copied.append((target, source))
            seconds = KERNEL_S if inside else target.nbytes / BYTES_PER_S
            self.current_stream().add(seconds, _copier(target, source))

    def empty(self, nbytes: int) -> Tensor:
        """Host memory that is treated as the device's."""
        self.allocated.append(nbytes)
        if nbytes > self.room:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.\nIf so, do so.")
        self.room -= nbytes
        self._memory.append(torch.full((nbytes,), 0xA5, dtype=torch.uint8))
        return self._memory[-1]

    def host(self, nbytes: int) -> Tensor:
        self.hosts += 1
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def block_until(self, event: Any) -> None:
        """Advances the clock if the calling thread made the device."""
        assert isinstance(event, FakeEvent)
        assert event.point is not None, "waited for an event that was never recorded"
        self.block_at(event.point)

    def is_capturing(self) -> bool:
        """Whether a graph is being captured, as set by the test."""
        return self.capturing

    def pin(self, memory: Tensor) -> str | None:
        """Pins the memory unless the test sets a problem."""
        if self.pin_problem is None:
            self.pinned.append(memory.data_ptr())
        return self.pin_problem

    def unpin(self, memory: Tensor) -> None:
        """Unpins memory that was pinned."""
        self.pinned.remove(memory.data_ptr())

    def run(self, seconds: float, effect: Callable[[], None] = lambda: None) -> None:
        """A kernel of the training, on the current stream."""
        self.current_stream().add(seconds, effect)

    def advance(self, seconds: float) -> None:
        """Advance the clock."""
        with self.changed:
            until = self.now + seconds
            while self._happen(until):
                pass
            self.now = until
            self.changed.notify_all()

    def idle(self) -> None:
        """Advance the clock until all issued work is done."""
        with self.changed:
            while self._happen(float("inf")):
                pass
            self.changed.notify_all()
        assert not any(stream.work for stream in self._streams), "a stream waits for what never comes"

    def reach(self, point: _Point, stream: FakeStream) -> None:
        """Mark the point as reached."""
        point.reached_at = stream.now

    def block_at(self, point: _Point) -> None:
        """Block the calling thread until the clock has reached the point."""
        with self.changed:
            if threading.get_ident() == self._owner:
                while point.reached_at is None:
                    assert self._happen(float("inf")), "blocked for ever"
                self.now = max(self.now, point.reached_at)
                self.changed.notify_all()
            else:
                assert self.changed.wait_for(lambda: self._is_past(point), _PATIENCE_S), "the clock does not advance"

    def _is_past(self, point: _Point) -> bool:
        return point.reached_at is not None and point.reached_at <= self.now

    def _happen(self, until: float) -> bool:
        """Run the work that ends first, if it ends by then."""
        ready = [(end, stream) for stream in self._streams if (end := _end(stream)) is not None and end <= until]
        if not ready:
            return False
        end, stream = min(ready, key=lambda item: item[0])
        work = stream.work.popleft()
        stream.now = end
        self.now = max(self.now, end)
        work.effect()
        return True


def _end(stream: FakeStream) -> float | None:
    """When the stream's next piece of work ends; None while it waits."""
    if not stream.work:
        return None
    work = stream.work[0]
    after = 0.0
    if work.after is not None:
        if work.after.reached_at is None:
            return None
        after = work.after.reached_at
    return max(stream.now, work.issued_at, after) + work.duration_s


def _copier(target: Tensor, source: Tensor) -> Callable[[], None]:
    def effect() -> None:
        with torch.no_grad():
            target.copy_(source)

    return effect


def _inside(view: Tensor, memory: Tensor) -> bool:
    return memory.data_ptr() <= view.data_ptr() < memory.data_ptr() + max(1, memory.nbytes)
