"""A detector of torn snapshots on a CUDA device: every element of every tensor says of which step it is.

Real optimizers and other writers of the weights, thousands of steps, slots in private and in shared memory. With the
wait removed it finds torn snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ema_proto.wire.messages import Join, Joined, Mode
from support.fake_worker import FakeWorker, client_of
from support.late_copies import delay_copies
from support.waiting import eventually
from trainer_client.staging.slots import Slot, make_slots
from trainer_client.staging.stagers import Stagers
from trainer_client.staging.transfer import AsyncCopy

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::UserWarning")]

LR = 2.0**-6
STEPS = 1000
WRITER_STEPS = 400
SURE_EVERY = 8  # so many steps have one snapshot for certain; the others have one if a slot happens to be free

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}


class Dated(nn.Module):
    """20 MB, on every way that a tensor can take. AdamW with gradients of 1 makes all elements -LR times the step."""

    seen: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        shapes = [(1_000_000,), *[(100,)] * 50, (1_500_000,)]
        weights = [torch.zeros(shape, device=device) for shape in shapes]
        weights.insert(20, torch.zeros(1000, 1500, device=device).t())
        self.weights = nn.ParameterList(map(nn.Parameter, weights))
        self.register_buffer("seen", torch.zeros(30, device=device))
        for weight in self.weights:
            weight.grad = torch.ones_like(weight)

    def optimizer(self, **how: Any) -> AdamW:
        return AdamW(self.parameters(), lr=LR, weight_decay=0.0, **how)


class DatingWorker(FakeWorker):
    """Reads the step of each snapshot from its bytes, and releases the slot."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__(slots=2)
        self.checked = 0
        self.torn: list[tuple[int, float, float]] = []
        self._share = shared

    def join(self, join: Join, timeout_s: float, files: tuple[bytes, ...] = ()) -> Joined:
        joined = super().join(join, timeout_s, files)
        if self._share:
            self.slots = make_slots(join.manifest.nbytes, self.slots_count, shared=True)
            self.free = list(self.slots)
        return joined

    def acquire(self, wait_s: float, *, reconnecting: bool = False) -> Slot | None:
        if len(self.waits) % SURE_EVERY == 0:
            eventually(lambda: bool(self.free), "a slot is free")
        return super().acquire(wait_s, reconnecting=reconnecting)

    def _send(self, slot: Slot, step: int, mode: Mode) -> None:
        self.checked += 1
        low, high = (-value.item() / LR for value in slot.tensor.view(torch.float32).aminmax())
        if (torch.tensor([low, high]).round() != step).any():
            self.torn.append((step, high, low))
        self.give_back(slot)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The current CUDA device; what a test issued to it ends with the test."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


def _ignore_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send snapshots that were written meanwhile, so that the detector sees them."""
    monkeypatch.setattr(AsyncCopy, "seal", lambda self, **_: setattr(self, "_is_torn", False))


def _step(model: Dated, optimizer: AdamW, step: int) -> None:
    model.seen.fill_(-LR * step)  # forward
    optimizer.step()


@pytest.mark.parametrize("memory", ["private", "shared"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_snapshot_of_an_optimizer_is_torn(device: torch.device, kind: str, memory: str) -> None:
    model, worker = Dated(device), DatingWorker(shared=memory == "shared")
    optimizer = model.optimizer(**OPTIMIZERS[kind])
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for step in range(1, STEPS + 1):
            _step(model, optimizer, step)
        assert client.flush(timeout_s=120)
        assert all(slot.tensor.is_pinned() for slot in worker.slots)

    assert worker.checked >= STEPS // SURE_EVERY
    assert worker.torn == []
    assert client.stats()["torn"] == 0


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_detector_finds_the_missing_wait(
    device: torch.device, kind: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_copies(monkeypatch)
    _ignore_versions(monkeypatch)
    if not waits:
        monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    model, worker = Dated(device), DatingWorker()
    optimizer = model.optimizer(**OPTIMIZERS[kind])
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for step in range(1, 25):
            _step(model, optimizer, step)
        assert client.flush(timeout_s=120)

    assert worker.checked >= 3
    assert bool(worker.torn) is not waits


def _load(model: Dated) -> None:
    """Other weights by `load_state_dict`, and these again."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.full_like(tensor, 7.0) for name, tensor in kept.items()})
    model.load_state_dict(kept)


def _swap_values(model: Dated) -> None:
    """Weights make room for an average, through `.data`, and are restored, as by diffusers' `EMAModel`."""
    kept = [weight.data.clone() for weight in model.weights]
    for weight in model.weights:
        weight.data.copy_(torch.full_like(weight.data, 7.0))
    for weight, value in zip(model.weights, kept, strict=True):
        weight.data.copy_(value)


def _swap_memory(model: Dated) -> None:
    """The same by pointers."""
    kept = [weight.data for weight in model.weights]
    for weight in model.weights:
        weight.data = torch.full_like(weight.data, 7.0)
    for weight, value in zip(model.weights, kept, strict=True):
        weight.data = value


@torch.no_grad()
def _clip(model: Dated) -> None:
    """Weights are clipped, and made what they were."""
    kept = [weight.clone() for weight in model.weights]
    for weight in model.weights:
        weight.clamp_(min=7.0)
    torch._foreach_copy_(list(model.weights), kept)


WRITERS: dict[str, Callable[[Dated], None]] = {
    "load_state_dict": _load,
    "values through .data": _swap_values,
    "memory": _swap_memory,
    "clipping": _clip,
}


def _with_writer(device: torch.device, write: Callable[[Dated], None], steps: int, *, announced: bool) -> DatingWorker:
    model, worker = Dated(device), DatingWorker()
    optimizer = model.optimizer(fused=True)
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for step in range(1, steps + 1):
            _step(model, optimizer, step)
            if announced:
                client.before_weight_write()
            write(model)
        assert client.flush(timeout_s=120)
        assert client.stats()["torn"] == 0 or not announced
    return worker


@pytest.mark.parametrize("writer", WRITERS)
def test_no_snapshot_is_torn_by_an_announced_writer(device: torch.device, writer: str) -> None:
    worker = _with_writer(device, WRITERS[writer], WRITER_STEPS, announced=True)

    assert worker.checked >= WRITER_STEPS // SURE_EVERY
    assert worker.torn == []


@pytest.mark.parametrize("writer", ["load_state_dict", "memory", "clipping"])
def test_unannounced_writer_that_versions_show_tears_no_snapshot(device: torch.device, writer: str) -> None:
    assert _with_writer(device, WRITERS[writer], WRITER_STEPS, announced=False).torn == []


def test_detector_finds_the_missing_wait_before_a_writer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    delay_copies(monkeypatch)
    _ignore_versions(monkeypatch)
    monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)

    assert _with_writer(device, _swap_values, 10, announced=False).torn != []
