"""An accelerator as staging needs it: streams, events, asynchronous copies, locked host memory.

`Device` is the interface and `Cuda` implements it with torch.cuda; tests have one on a simulated clock. Calls issue
work to a stream and return, except those that say that they block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: captures of other threads do not concern this one

# Kernels that copy many tensors at once support these only by their signed counterparts.
_SIGNED = {torch.uint64: torch.int64, torch.uint32: torch.int32, torch.uint16: torch.int16}


class DeviceStream(Protocol):
    """A queue of work on a device, done in order."""

    def synchronize(self) -> None:
        """Block the calling thread until all that was issued is done."""


class DeviceEvent(Protocol):
    """A point in a stream."""

    def record(self, stream: Any) -> None:
        """Mark the work that `stream` has been given so far."""

    def wait(self, stream: Any) -> None:
        """Have `stream` wait for the event as last recorded; an event never recorded is not waited for."""


class Device(Protocol):
    """One device. A thread issues work to its current stream."""

    def current_stream(self) -> DeviceStream: ...

    def new_stream(self) -> DeviceStream: ...

    def new_event(self) -> DeviceEvent: ...

    def issue_to(self, stream: Any) -> AbstractContextManager[Any]:
        """Make `stream` the calling thread's current one for a while."""

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Issue copies of equal dtypes and shapes: within the device, or row-major ones to locked memory."""

    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device: uint8, 1-D."""

    def host(self, nbytes: int) -> Tensor:
        """Locked host memory: uint8, 1-D. It may be freed while a copy to it is in progress."""

    def block_until(self, event: DeviceEvent) -> None:
        """Block the calling thread until `event` has happened, without the interpreter's lock."""

    def is_capturing(self) -> bool:
        """Whether the current stream's work is being captured into a graph instead of done."""

    def pin(self, memory: Tensor) -> str | None:
        """Lock host memory, so that copies to it are asynchronous; None, or why that is not possible."""

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`."""


DeviceOf: TypeAlias = Callable[[torch.device], Device | None]


class Cuda:
    """A CUDA (or ROCm) device. Slots do not come from torch's caching host allocator, so their size is exact."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current_stream(self) -> DeviceStream:
        return torch.cuda.current_stream(self._device)

    def new_stream(self) -> DeviceStream:
        stream: DeviceStream = torch.cuda.Stream(self._device)
        return stream

    def new_event(self) -> DeviceEvent:
        event: DeviceEvent = torch.cuda.Event(blocking=True)  # its waiter sleeps instead of spinning on a core
        return event

    @contextmanager
    def issue_to(self, stream: Any) -> Iterator[None]:
        # torch.cuda.stream ends by setting the device that was current; without the outer block that device would get a
        # context.
        with self._current(), torch.cuda.stream(stream):
            yield

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        # One call for all: a few kernels within the device where dtype and strides agree, else a loop in C++.
        if not targets:
            return
        if any(target.dtype in _SIGNED for target in targets):
            targets, sources = [*map(_signed, targets)], [*map(_signed, sources)]
        torch._foreach_copy_(targets, sources, non_blocking=True)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def host(self, nbytes: int) -> Tensor:
        with torch.cuda.device(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def block_until(self, event: Any) -> None:
        # A thread whose current device was never set would open a context on device 0.
        with torch.cuda.device(self._device), _alongside_captures():
            event.synchronize()

    def is_capturing(self) -> bool:
        with self._current():
            return torch.cuda.is_current_stream_capturing()

    def _current(self) -> AbstractContextManager[object]:
        """Make the device current for a while. It mostly is, and looking costs a tenth of setting it."""
        if torch.cuda.current_device() == self._device.index:
            return nullcontext()
        return torch.cuda.device(self._device)

    def pin(self, memory: Tensor) -> str | None:
        # Not torch's pinned allocator, which rounds up to a power of two and keeps the memory.
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
        if int(code) == 0:
            return None
        self._clear_error()
        return str(runtime.cudaGetErrorString(code))

    def unpin(self, memory: Tensor) -> None:
        # At the end of a process the driver may be gone, and the locks with it; then the error is only cleared.
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = runtime.cudaHostUnregister(memory.data_ptr())
        if int(code) != 0:
            self._clear_error()

    def _clear_error(self) -> None:
        # The runtime reports an error at the next check, and torch checks after each kernel: training would get it.
        try:
            torch.zeros(1, device=self._device).add_(1.0)
        except RuntimeError:
            return


def _signed(tensor: Tensor) -> Tensor:
    signed = _SIGNED.get(tensor.dtype)
    return tensor if signed is None else tensor.view(signed)


@contextmanager
def _alongside_captures() -> Iterator[None]:
    """Let the calling thread wait while another one captures a graph.

    In its default mode a capture forbids every thread to wait for an event: the wait would fail, and the capture too.
    torch does the same where NCCL's watchdog queries its events.
    """
    driver = _driver()
    if driver is None:
        yield
        return
    mode = ctypes.c_int(_THREAD_LOCAL)
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # `mode` then holds the previous one
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@cache
def _driver() -> Any:
    """CUDA's driver, which is loaded already; None where there is none, as with ROCm."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def device_of(device: torch.device) -> Device | None:
    """The device behind a torch device if copies from it can overlap training, else None."""
    return Cuda(device) if device.type == "cuda" else None
