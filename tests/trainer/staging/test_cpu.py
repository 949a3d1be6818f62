"""The copy into a slot: exact bytes of any plain tensor, and nothing of the model's afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from support.snapshots import decode
from trainer_client.model.plan import Plan
from trainer_client.staging.cpu import CpuStager
from trainer_client.staging.slots import Slot, make_slots


def _odd_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    extra = nn.Module()
    extra.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))
    extra.register_buffer("empty", torch.zeros(0, 4))
    extra.register_buffer("mask", torch.tensor([True, False, True]))
    extra.register_buffer("bf16", torch.randn(5).to(torch.bfloat16))
    extra.register_buffer("octets", torch.arange(7, dtype=torch.uint8))
    extra.register_buffer("transposed", torch.arange(6, dtype=torch.int64).view(2, 3).t())
    extra.register_buffer("expanded", torch.ones(1).expand(4))
    extra.register_buffer("holes", torch.tensor([-float("inf"), float("nan"), -0.0]))
    extra.weight = nn.Parameter(torch.randn(3, 5))
    return model.append(extra)


def _filled(model: nn.Module) -> tuple[Plan, CpuStager, Slot]:
    plan = Plan.of(model)
    (slot,) = make_slots(plan.manifest.nbytes, 1)
    stager = CpuStager(plan.manifest)
    stager.stage(plan.tensors(), slot)
    return plan, stager, slot


def test_every_kind_of_plain_tensor_arrives_bit_for_bit() -> None:
    model = _odd_model()

    plan, _, slot = _filled(model)

    staged = decode(plan.manifest, slot.view)
    for name, tensor in model.state_dict().items():
        expected = tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []
        assert staged[name].shape == tensor.shape
        assert (staged[name].flatten().view(torch.uint8).tolist() if tensor.numel() else []) == expected, name


def test_weights_changed_after_the_copy_do_not_change_the_slot() -> None:
    model = _odd_model()
    _, _, slot = _filled(model)
    before = bytes(slot.view)

    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(123.0)

    assert bytes(slot.view) == before


def test_slot_is_overwritten_completely() -> None:
    model = nn.Linear(3, 3)
    plan, stager, slot = _filled(model)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)

    stager.stage(plan.tensors(), slot)

    assert slot.tensor.view(torch.float32).tolist() == [1.0] * 12


def test_each_slot_keeps_its_own_snapshot() -> None:
    model = nn.Linear(2, 2, bias=False)
    plan = Plan.of(model)
    stager, slots = CpuStager(plan.manifest), make_slots(plan.manifest.nbytes, 2)
    for value, slot in enumerate(slots):
        nn.init.constant_(model.weight, value)
        stager.stage(plan.tensors(), slot)

    assert [slot.tensor.view(torch.float32).tolist() for slot in slots] == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("first", [True, False], ids=["first copy in inference mode", "second copy in inference mode"])
def test_inference_mode_makes_no_difference(first: bool) -> None:
    model = nn.Linear(2, 2)
    plan = Plan.of(model)
    (slot,) = make_slots(plan.manifest.nbytes, 1)
    stager = CpuStager(plan.manifest)
    for mode in (first, not first):
        nn.init.constant_(model.weight, float(mode))
        with torch.inference_mode(mode):
            stager.stage(plan.tensors(), slot)

        assert decode(plan.manifest, slot.view)["weight"].tolist() == [[float(mode)] * 2] * 2


def test_copying_records_no_gradient() -> None:
    model = nn.Linear(2, 2)

    _, _, slot = _filled(model)

    assert not slot.tensor.requires_grad
    assert model.weight.grad_fn is None


def test_staging_allocates_no_tensor_memory() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    plan, stager, slot = _filled(model)
    gc.collect()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        stager.stage(plan.tensors(), slot)

    assert max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0) <= 0


def test_tensor_after_2_gib_is_staged_at_its_offset() -> None:
    wide = nn.Module()
    wide.register_buffer("first", torch.zeros(1, dtype=torch.int8).expand(2**31 + 5))
    last = torch.full((3,), 7, dtype=torch.int8)
    wide.register_buffer("last", last)
    plan = Plan.of(wide)
    (slot,) = make_slots(plan.manifest.nbytes, 1)

    view = CpuStager(plan.manifest)._views_of(slot)[1]
    view.copy_(last)

    assert plan.manifest.tensors[1].offset == 2**31 + 5
    assert bytes(slot.view[2**31 + 5 :]) == b"\x07\x07\x07"
