"""Training on a `FakeDevice`: weights that carry their step, written by an optimizer's queued kernels.

A snapshot whose tensors carry different steps is torn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ema_proto.wire.messages import Mode
from support.fake_device import FakeDevice
from support.fake_worker import FakeWorker
from support.snapshots import decode
from trainer_client import EmaClient
from trainer_client.model.shards import local_of
from trainer_client.settings import Settings
from trainer_client.staging.slots import Slot
from trainer_client.steps.hooks import Attachment

opened: list[tuple[FakeDevice, EmaClient]] = []  # clients made here: one that is left open receives later steps

LARGE = 70_000  # more floats than the scratch gathers


class RecordingWorker(FakeWorker):
    """Reads each snapshot when it is offered and releases its slot at once, as a fast server would."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__(slots)
        self.snapshots: list[tuple[int, dict[str, Tensor]]] = []

    def _send(self, slot: Slot, step: int, mode: Mode) -> None:
        self.snapshots.append((step, decode(self.joins[-1].manifest, slot.view)))
        super()._send(slot, step, mode)
        self.give_back(slot)

    @property
    def torn(self) -> list[int]:
        """Steps whose snapshot is not the weights of that step."""
        return [
            step for step, tensors in self.snapshots if any(bool((tensor != step).any()) for tensor in tensors.values())
        ]


def client_on(device: FakeDevice, worker: FakeWorker, **given: Any) -> EmaClient:
    """A client of a worker without a server, for a model that is treated as being on `device`."""

    class Client(EmaClient):
        @staticmethod
        def _connect(settings: Settings) -> FakeWorker:
            worker.device_of = lambda place: device
            return worker

    client = Client("tcp://127.0.0.1:5555", run="r", **given)
    opened.append((device, client))
    return client


class Carrying(nn.Module):
    """Parameters, large and small, and a buffer; all zeros, at step 0."""

    seen: Tensor

    def __init__(self, sizes: Iterable[int] = (LARGE, LARGE, 10, LARGE)) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
        self.register_buffer("seen", torch.zeros(30))


def note_write(tensor: Tensor) -> None:
    """Count a write in the tensor's version, as torch does when it issues one."""
    with torch.no_grad():
        tensor.add_(0)


def stamp(device: FakeDevice, tensors: Iterable[Tensor], value: float, seconds: float = 1e-6) -> None:
    """A kernel for each tensor, which fills it when it ends; its version does not change."""
    for tensor in tensors:
        device.run(seconds, _filler(tensor, value))


def _filler(tensor: Tensor, value: float) -> Callable[[], None]:
    data = local_of(tensor).data

    def effect() -> None:
        data.fill_(value)

    return effect


class Stamping(Optimizer):
    """The n-th step fills the parameters with n. With `noted=False` it writes as through `.data`."""

    def __init__(self, device: FakeDevice, parameters: Iterable[Tensor], *, noted: bool = True, steps: int = 0) -> None:
        super().__init__(parameters, {})
        self._device = device
        self._noted = noted
        self.steps = steps

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Issue the writes and return."""
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if self._noted:
                    note_write(parameter)
                stamp(self._device, [parameter], self.steps)


def train(device: FakeDevice, model: Carrying, optimizer: Stamping, steps: int, seconds: float = 0.02) -> None:
    """Steps that take `seconds` of device time each, while the loop runs one step ahead."""
    for _ in range(steps):
        stamp(device, [model.seen], optimizer.steps + 1)  # forward
        device.run(seconds)
        optimizer.step()
        device.advance(seconds)


class Training:
    """A client attached to a model on a fake device."""

    def __init__(self, *, noted: bool = True, slots: int = 2, **given: Any) -> None:
        self.device = FakeDevice()
        self.worker = RecordingWorker(slots)
        self.model = Carrying()
        self.optimizer = Stamping(self.device, self.model.parameters(), noted=noted)
        self.client = client_on(self.device, self.worker, **given)

    def attach(self) -> Attachment:
        return self.client.attach(self.model, self.optimizer)

    def train(self, steps: int) -> None:
        train(self.device, self.model, self.optimizer, steps)

    def end(self) -> None:
        """Run everything that was issued, and deliver the copies."""
        self.device.idle()
        assert self.client.flush(timeout_s=30)
