"""What issuing a snapshot's copies costs the training thread: calls, counted on a device with a simulated clock."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from support.fake_device import FakeDevice
from trainer_client.model.plan import Plan
from trainer_client.staging.overlapped import OverlappedStager
from trainer_client.staging.slots import Slot, make_slots

SMALL, LARGE = 10, 70_000  # floats; small ones are gathered
FEW, MANY = 10, 110
CALLS = ("issue_to", "copy", "new_event", "new_stream", "empty", "host", "is_capturing", "pin")


class CountingDevice(FakeDevice):
    """Counts the calls of its interface."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        for name in CALLS:
            setattr(self, name, self._counted(name))

    def _counted(self, name: str) -> Callable[..., Any]:
        method = getattr(self, name)

        def call(*args: Any) -> Any:
            self.calls[name] += 1
            return method(*args)

        return call


class Snapshots:
    """Stages snapshots of a module into one slot, and counts."""

    def __init__(self, module: nn.Module) -> None:
        self.device = CountingDevice()
        plan = Plan.of(module)
        self.manifest, self.tensors = plan.manifest, plan.tensors()
        self.slot: Slot = make_slots(plan.manifest.nbytes, 1)[0]
        self.stager = OverlappedStager(plan.manifest, self.device)
        self.stage()  # what is computed once

    def stage(self) -> None:
        copy = self.stager.stage(self.tensors, self.slot)
        self.device.idle()
        assert copy.wait()

    def device_calls(self) -> Counter[str]:
        """Those of one snapshot."""
        self.device.calls.clear()
        self.stage()
        return self.device.calls

    def python_calls(self) -> int:
        """How many functions one snapshot calls before `stage` returns, without those of the device."""
        copy, self.device.copy = self.device.copy, lambda *_: None  # type: ignore[method-assign]
        count = 0

        def called(frame: FrameType, event: str, arg: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(called)
        try:
            staged = self.stager.stage(self.tensors, self.slot)
        finally:
            sys.setprofile(None)
        self.device.copy = copy  # type: ignore[method-assign]
        self.device.idle()
        assert staged.wait()
        return count


def _module(large: int, small: int = 0) -> nn.Module:
    sizes = [LARGE] * large + [SMALL] * small
    return nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])


def test_small_tensors_between_large_ones_are_one_copy_to_the_host() -> None:
    module = nn.ParameterList([nn.Parameter(torch.full((size,), float(size))) for size in [LARGE, SMALL] * 50])
    snapshots = Snapshots(module)
    before = len(snapshots.device.copied)

    snapshots.stage()

    assert len(snapshots.device.copied) - before == 50 + 1 + 50, "gathered, all small ones, large ones"
    for spec in snapshots.manifest.tensors:
        found = snapshots.slot.tensor[spec.offset : spec.offset + spec.nbytes].view(torch.float32)
        assert found.unique().tolist() == [float(spec.shape[0])]


def test_device_is_called_as_often_for_many_tensors_as_for_few() -> None:
    few, many = Snapshots(_module(FEW, FEW)), Snapshots(_module(MANY, MANY))
    before = len(few.device.copied), len(many.device.copied)

    assert few.device_calls() == many.device_calls()
    assert few.device.calls["copy"] == 4, "small ones, buffers that are not gathered (none), spans, large ones"
    copied = len(few.device.copied) - before[0], len(many.device.copied) - before[1]
    assert copied[1] - copied[0] == 2 * (MANY - FEW), "each tensor is copied"


@pytest.mark.parametrize(("kind", "calls"), [("large", 7), ("small", 1)])
def test_each_tensor_costs_the_training_thread_a_few_calls(kind: str, calls: int) -> None:
    few, many = (_module(**{"large": 1, kind: count}) for count in (FEW, MANY))
    added = Snapshots(many).python_calls() - Snapshots(few).python_calls()

    assert 0 < added <= calls * (MANY - FEW)


def test_mixed_strides_and_dtypes_are_copied_in_one_call_for_each() -> None:
    module = nn.Module()
    module.wide = nn.Parameter(torch.randn(LARGE))
    for index in range(5):
        module.register_parameter(f"plain{index}", nn.Parameter(torch.randn(2, 3)))
        module.register_parameter(f"turned{index}", nn.Parameter(torch.randn(3, 2).t()))
        module.register_buffer(f"half{index}", torch.randn(4).half())
    snapshots = Snapshots(module)

    assert snapshots.device_calls()["copy"] == 3 + 3, "plain, turned, half; buffers, spans, large ones"
    for spec, tensor in zip(snapshots.manifest.tensors, snapshots.tensors, strict=True):
        held = tensor.detach().contiguous().view(-1).view(torch.uint8)
        assert torch.equal(snapshots.slot.tensor[spec.offset : spec.offset + spec.nbytes], held), spec.name
