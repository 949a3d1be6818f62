"""Fakes of CUDA's runtime and driver and of torch's calls to them: which device is current, which has a context."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

GPU = torch.device("cuda", 1)  # the current device is 0 by default


class CudaRuntime:
    """Replaces `torch.cuda`, an event and the libraries, as far as the client calls them."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.current = 0
        self.mode = 0
        self.captures_elsewhere = False
        self.contexts: set[int] = set()
        self.calls: list[tuple[object, ...]] = []

    def current_device(self) -> int:
        return self.current

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """Like torch's: restoring the device opens no context."""
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        """Like torch's: restoring sets the device that was current, and CUDA opens a context for it."""
        before, self.current = self.current, GPU.index
        yield
        self.current = before
        self.contexts.add(before)

    def Event(self, *, blocking: bool) -> CudaRuntime:
        """Returns this object as an event."""
        return self

    def record(self, stream: object) -> None:
        """An event's."""

    def query(self) -> bool:
        """An event's, which is not reached."""
        self.contexts.add(self.current)
        return False

    def cudart(self) -> CudaRuntime:
        return self

    def synchronize(self) -> None:
        """An event's."""
        if self.captures_elsewhere and self.mode == 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.contexts.add(self.current)

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        wanted = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int)).contents
        self.mode, wanted.value = wanted.value, self.mode
        return 0

    def cudaHostRegister(self, *args: int) -> int:
        self.contexts.add(self.current)
        self.calls.append(("register", *args))
        return self.code

    def cudaHostUnregister(self, *args: int) -> int:
        self.contexts.add(self.current)
        self.calls.append(("unregister", *args))
        return self.code

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"
