"""What CUDA is asked for, and with which device current: looked at from its outside, where there is no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer_client import device as device_module
from trainer_client.device import Cuda
from trainer_client.slots import make_slots

GPU = torch.device("cuda", 1)  # the current device is 0 until someone says otherwise


class _Runtime:
    """CUDA's runtime and driver, and torch's way to them, as far as we call them."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.current = 0
        self.mode = 0
        self.captures_elsewhere = False
        self.contexts: set[int] = set()
        self.calls: list[tuple[object, ...]] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """As torch's: going back opens no context."""
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        """As torch's: going back sets the device that was current, and CUDA opens a context for it."""
        before, self.current = self.current, GPU.index
        yield
        self.current = before
        self.contexts.add(before)

    def cudart(self) -> _Runtime:
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


def _installed(monkeypatch: pytest.MonkeyPatch, runtime: _Runtime) -> _Runtime:
    monkeypatch.setattr(torch, "cuda", runtime)
    monkeypatch.setattr(device_module, "_driver", lambda: runtime)
    return runtime


@pytest.mark.parametrize(("code", "problem"), [(0, None), (2, "error 2")])
def test_the_exact_bytes_of_a_slot_are_registered_and_an_error_is_told(
    code: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = _installed(monkeypatch, _Runtime(code))
    monkeypatch.setattr(Cuda, "_clear_error", lambda _: None)
    (slot,) = make_slots(5000, 1)
    device = Cuda(GPU)

    assert device.pin(slot.tensor) == problem
    device.unpin(slot.tensor)

    address = slot.tensor.data_ptr()
    assert runtime.calls == [("register", address, 5000, 1), ("unregister", address)]


def test_a_gpu_that_the_model_is_not_on_gets_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _installed(monkeypatch, _Runtime())
    (slot,) = make_slots(5000, 1)
    device = Cuda(GPU)

    device.pin(slot.tensor)
    with device.issue_to("a stream"):
        assert runtime.current == 1
    device.block_until(runtime)
    device.unpin(slot.tensor)

    assert runtime.current == 0
    assert runtime.contexts == {1}


def test_waiting_for_a_copy_leaves_a_graph_alone_that_another_thread_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _installed(monkeypatch, _Runtime())
    runtime.captures_elsewhere = True

    Cuda(GPU).block_until(runtime)

    assert runtime.mode == 0, "the thread is as strict as before"


def test_without_cuda_s_driver_a_copy_is_waited_for_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _installed(monkeypatch, _Runtime())
    monkeypatch.setattr(device_module, "_driver", lambda: None)

    Cuda(GPU).block_until(runtime)

    assert runtime.contexts == {1}


def test_words_that_kernels_do_not_know_are_copied_as_those_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, seen = torch._foreach_copy_, list[torch.dtype]()

    def looked_at(targets: list[Tensor], sources: list[Tensor], *, non_blocking: bool) -> None:
        seen.extend(tensor.dtype for tensor in [*targets, *sources])
        copy(targets, sources, non_blocking=non_blocking)

    monkeypatch.setattr(torch, "_foreach_copy_", looked_at)
    sources = [torch.arange(6).to(dtype).view(2, 3).t() for dtype in (torch.uint16, torch.uint32, torch.uint64)]
    targets = [torch.empty_like(source) for source in sources]

    Cuda(torch.device("cpu")).copy(targets, sources)

    assert set(seen) == {torch.int16, torch.int32, torch.int64}
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
