"""An accelerator as staging needs it: streams, events, asynchronous copies, memory of the host that it may write to.

Comes in: tensors and addresses. Goes out: work issued to a stream, never waited for unless that is what is asked. Knows
no snapshot and no slot. `Device` is the door; `Cuda` goes through torch.cuda, tests have one with a clock of their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: captures of other threads do not concern this one

# Kernels that copy many tensors at once know these only by their signed twins.
_SIGNED = {torch.uint64: torch.int64, torch.uint32: torch.int32, torch.uint16: torch.int16}


class DeviceStream(Protocol):
    """Work in the order in which it was issued."""

    def synchronize(self) -> None:
        """Block the calling thread until all that was issued is done."""
        ...


class DeviceEvent(Protocol):
    """A point in a stream."""

    def record(self, stream: Any) -> None:
        """The event is what `stream` has been given so far."""
        ...

    def wait(self, stream: Any) -> None:
        """Have `stream` wait for the event as it was last recorded; for none if it never was. Returns at once."""
        ...


class Device(Protocol):
    """One device. A thread issues work to its current stream."""

    def current_stream(self) -> DeviceStream:
        """Where the calling thread's work goes now."""
        ...

    def new_stream(self) -> DeviceStream:
        """Another stream."""
        ...

    def new_event(self) -> DeviceEvent:
        """An event that was not recorded yet."""
        ...

    def issue_to(self, stream: Any) -> AbstractContextManager[Any]:
        """Have the calling thread's work go to `stream` meanwhile."""
        ...

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Issue copies of equal dtypes and shapes: within the device, or row-major ones to pinned memory."""
        ...

    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device: uint8, 1-D."""
        ...

    def block_until(self, event: DeviceEvent) -> None:
        """Block the calling thread until `event` has happened, the interpreter's lock released."""
        ...

    def is_capturing(self) -> bool:
        """Whether the current stream's work is being recorded into a graph instead of done."""
        ...

    def pin(self, memory: Tensor) -> str | None:
        """Lock host memory, so that copies to it are asynchronous; None, or why that is not possible."""
        ...

    def unpin(self, memory: Tensor) -> None:
        """Take `pin` back."""
        ...


DeviceOf: TypeAlias = Callable[[torch.device], Device | None]


class Cuda:
    """A CUDA (or ROCm) device. Nothing here is kept by torch's allocators: slots have their exact size."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current_stream(self) -> DeviceStream:
        """The current stream of this device, whichever device is current."""
        return torch.cuda.current_stream(self._device)

    def new_stream(self) -> DeviceStream:
        """A stream from torch's pool, which has other streams than the default only once CUDA is in use."""
        stream: DeviceStream = torch.cuda.Stream(self._device)
        return stream

    def new_event(self) -> DeviceEvent:
        """An event whose waiter sleeps instead of spinning on a core."""
        event: DeviceEvent = torch.cuda.Event(blocking=True)
        return event

    @contextmanager
    def issue_to(self, stream: Any) -> Iterator[None]:
        """`torch.cuda.stream`, which ends by setting the device that was current: another one would get a context."""
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """One call for all: a few kernels within the device where dtype and strides agree, else a loop in C++."""
        if targets:
            torch._foreach_copy_([*map(_signed, targets)], [*map(_signed, sources)], non_blocking=True)

    def empty(self, nbytes: int) -> Tensor:
        """Memory from torch's allocator, of the current stream."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def block_until(self, event: Any) -> None:
        """One call of the driver, which sleeps in it; a graph that another thread captures meanwhile stays whole."""
        # A thread whose current device was never set would open a context on device 0.
        with torch.cuda.device(self._device), _beside_captures():
            event.synchronize()

    def is_capturing(self) -> bool:
        """Asks the driver about the current stream."""
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def pin(self, memory: Tensor) -> str | None:
        """`cudaHostRegister`, and not torch's pinned allocator, which rounds up to a power of two and keeps it."""
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
        if int(code) == 0:
            return None
        self._clear_error()
        return str(runtime.cudaGetErrorString(code))

    def unpin(self, memory: Tensor) -> None:
        """`cudaHostUnregister`; at the end of a process the driver may be gone, and the pins with it."""
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = runtime.cudaHostUnregister(memory.data_ptr())
        if int(code) != 0:
            self._clear_error()

    def _clear_error(self) -> None:
        # The runtime remembers an error until it is asked, and torch asks after a kernel: the training would be told.
        try:
            torch.zeros(1, device=self._device).add_(1.0)
        except RuntimeError:
            return


def _signed(tensor: Tensor) -> Tensor:
    twin = _SIGNED.get(tensor.dtype)
    return tensor if twin is None else tensor.view(twin)


@contextmanager
def _beside_captures() -> Iterator[None]:
    """Let the calling thread wait while another one captures a graph.

    In its default mode a capture forbids every thread what could disturb it, waiting for an event included: the wait
    would fail and the capture with it. torch does the same where NCCL's watchdog looks at its events.
    """
    driver = _driver()
    if driver is None:
        yield
        return
    mode = ctypes.c_int(_THREAD_LOCAL)
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # the mode from before is in `mode` then
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
    """The device behind a torch device, if snapshots of what lies there can be copied while training goes on."""
    return Cuda(device) if device.type == "cuda" else None
