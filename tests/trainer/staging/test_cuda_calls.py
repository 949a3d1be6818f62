"""Calls of the CUDA libraries, and the current device during them, with fakes instead of a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.cuda_runtime import GPU, CudaRuntime
from trainer_client.staging import device as device_module
from trainer_client.staging.device import Cuda
from trainer_client.staging.slots import make_slots


def _installed(monkeypatch: pytest.MonkeyPatch, runtime: CudaRuntime) -> CudaRuntime:
    monkeypatch.setattr(torch, "cuda", runtime)
    monkeypatch.setattr(device_module, "_driver", lambda: runtime)
    return runtime


@pytest.mark.parametrize(("code", "problem"), [(0, None), (2, "error 2")])
def test_exact_bytes_of_a_slot_are_registered_and_errors_returned(
    code: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = _installed(monkeypatch, CudaRuntime(code))
    monkeypatch.setattr(Cuda, "_clear_error", lambda _: None)
    (slot,) = make_slots(5000, 1)
    device = Cuda(GPU)

    assert device.pin(slot.tensor) == problem
    device.unpin(slot.tensor)

    address = slot.tensor.data_ptr()
    assert runtime.calls == [("register", address, 5000, 1), ("unregister", address)]


def test_gpu_without_the_model_gets_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _installed(monkeypatch, CudaRuntime())
    (slot,) = make_slots(5000, 1)
    device = Cuda(GPU)

    device.pin(slot.tensor)
    with device.issue_to("a stream"):
        assert runtime.current == 1
    device.block_until(runtime)
    device.unpin(slot.tensor)

    assert runtime.current == 0
    assert runtime.contexts == {1}


def test_waiting_for_a_copy_does_not_disturb_another_threads_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _installed(monkeypatch, CudaRuntime())
    runtime.captures_elsewhere = True

    Cuda(GPU).block_until(runtime)

    assert runtime.mode == 0, "the thread is as strict as before"


def test_copy_is_waited_for_without_the_cuda_driver_library(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _installed(monkeypatch, CudaRuntime())
    monkeypatch.setattr(device_module, "_driver", lambda: None)

    Cuda(GPU).block_until(runtime)

    assert runtime.contexts == {1}


def test_unsigned_words_are_copied_as_signed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
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
