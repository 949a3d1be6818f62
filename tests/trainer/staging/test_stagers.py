"""Which way a snapshot is copied: only from one CUDA device while training goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.fake_device import FakeDevice
from trainer_client.model.plan import Plan
from trainer_client.staging.device import Cuda, Device, device_of
from trainer_client.staging.slots import Pins, Slot, make_slots
from trainer_client.staging.stagers import Stagers


def _stagers(model: nn.Module, device: FakeDevice | None) -> tuple[Stagers, Plan, tuple[Slot, ...]]:
    plan = Plan.of(model)
    slots = make_slots(plan.manifest.nbytes, 2)

    def of(place: torch.device) -> Device | None:
        return device if place.type == "cpu" else None

    return Stagers(plan.manifest, slots, Pins(), of), plan, slots


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu", "meta"])
def test_only_cuda_devices_copy_during_training(kind: str) -> None:
    assert device_of(torch.device(kind)) is None
    assert isinstance(device_of(torch.device("cuda", 0)), Cuda)


def test_cpu_model_is_copied_on_return() -> None:
    model = nn.Linear(3, 3)
    stagers, plan, slots = _stagers(model, None)

    assert stagers.stage(plan.live(), slots[0], plan.check) is None
    assert torch.equal(slots[0].tensor.view(torch.float32)[:9].view(3, 3), model.weight)
    stagers.hold_back_writes()
    assert not stagers.is_capturing()


def test_tensors_on_several_devices_do_not_overlap() -> None:
    stagers, plan, _ = _stagers(nn.Linear(3, 3), FakeDevice())
    weight, bias = plan.tensors()

    assert stagers.prepare([weight, bias])
    assert not stagers.prepare([weight, bias.to("meta")])
    assert stagers.prepare([weight, bias])


def test_capture_is_detected_without_overlap_too() -> None:
    device = FakeDevice()
    stagers, plan, _ = _stagers(nn.Linear(3, 3), device)
    weight, bias = plan.tensors()
    stagers.prepare([weight, bias.to("meta")])
    device.capturing = True

    assert stagers.is_capturing()
