"""A CUDA device as a `Backend`, and the device that a setting names.

A device that cannot be used is found when the server starts, not when the first run comes.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ema_server.compute.accelerator import Accelerator
from ema_server.compute.device import HOST, Device
from ema_server.compute.memory import HostMemory, allocate, host_memory

_GIB = 1 << 30
_POLLING_S = 200e-6

logger = logging.getLogger(__name__)


class DeviceError(ValueError):
    """The setting names a device that cannot be used; the text says why, and what to do."""


def open_device(name: str) -> Device:
    """The device of this name.

    Args:
        name: `cpu`, `cuda` (the first one), or `cuda:INDEX`.

    Raises:
        DeviceError: it cannot be used.
    """
    if name == "cpu":
        return HOST
    index = int(name.partition(":")[2]) if ":" in name else 0
    _require(name, index)
    try:
        return Accelerator(f"cuda:{index}", CudaBackend(index))
    except (RuntimeError, MemoryError) as error:
        raise unusable(name, error) from None


def unusable(name: str, error: Exception) -> DeviceError:
    """The error for a device of this name that failed during its setup."""
    return DeviceError(f"device is {name!r}: it cannot be used: {_one_line(error)}")


def _require(name: str, index: int) -> None:
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f"device is {name!r}: torch {torch.__version__} was built without CUDA: install a build with it "
            "(https://pytorch.org/get-started), or use --device cpu"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = "".join(f" ({_one_line(warning.message)})" for warning in caught[:1])
        raise DeviceError(
            f"device is {name!r}: torch finds no CUDA device{why}: check its driver, and whether this container has "
            "access to it, or use --device cpu"
        )
    count = torch.cuda.device_count()
    if index >= count:
        known = ", ".join(f"cuda:{known}" for known in range(count))
        raise DeviceError(f"device is {name!r}: torch finds {count} CUDA devices: use {known}, or cpu")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


class CudaBackend:
    """The CUDA device of this number.

    Raises:
        RuntimeError: it does not work.
    """

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self._unpinned = False
        torch.cuda.synchronize(self.device)

    def stream(self) -> CudaStream:
        return CudaStream(torch.cuda.Stream(self.device))

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError:
            text = f"cannot allocate {nbytes} bytes on {self.device}: only {self.free_bytes()} are available"
            raise MemoryError(text) from None

    def host(self, nbytes: int) -> HostMemory:
        """Pinned memory, or if the system provides none, pageable memory, which is slower."""
        try:
            with torch.cuda.device(self.device):
                data = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            if not self._unpinned:
                logger.warning("no memory could be pinned: copies to %s are slower (%s)", self.device, _one_line(error))
            self._unpinned = True
            return allocate(nbytes, touch=True)
        return host_memory(data)

    def free_bytes(self) -> int:
        """Free memory of the device, and memory that torch has reserved and does not use."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def describe(self) -> str:
        free, total = torch.cuda.mem_get_info(self.device)
        return f"{torch.cuda.get_device_name(self.device)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    @contextmanager
    def current(self) -> Iterator[None]:
        # torch.cuda.stream alone ends by setting the device that was current: GPU 0 would get a context.
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            yield

    def mark(self) -> CudaMark:
        event = torch.cuda.Event(blocking=True)  # a waiting thread sleeps
        event.record(self._stream)
        return CudaMark(event, self._stream.device)


class CudaMark:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def hold(self) -> None:
        self._event.wait()

    def wait(self) -> None:
        """Poll for a moment, which most waits take; then sleep: waking up takes as long as moving megabytes."""
        with torch.cuda.device(self._device):
            until = time.perf_counter() + _POLLING_S
            while not self._event.query():
                if time.perf_counter() > until:
                    self._event.synchronize()
                    return
                time.sleep(0)  # other threads get the interpreter's lock
