"""Which way each tensor takes from a device: everything once, small things together, within the memory allowed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from support.fake_device import FakeDevice
from trainer_client.model.plan import Plan
from trainer_client.staging import copy_plan, overlapped
from trainer_client.staging.copy_plan import SCRATCH_BYTES, SMALL_BYTES, CopyPlan, pieces
from trainer_client.staging.cpu import CpuStager
from trainer_client.staging.overlapped import OverlappedStager
from trainer_client.staging.slots import make_slots

_SPECS = st.lists(
    st.tuples(
        st.sampled_from(["F64", "F32", "BF16", "BOOL"]),
        st.lists(st.integers(0, 40), max_size=3),
        st.sampled_from(list(Role)),
    ),
    min_size=1,
    max_size=30,
).filter(lambda items: any(math.prod(shape) for _, shape, _ in items))


def _manifest(items: list[tuple[str, list[int], Role]]) -> Manifest:
    return layout(TensorSpec(f"t{i}", dtype, tuple(shape), role, 0) for i, (dtype, shape, role) in enumerate(items))


def _all(copies: CopyPlan) -> list[int]:
    return [index for index, _ in copies.gathered] + [*copies.on_compute, *copies.on_side]


@given(_SPECS, st.integers(0, 20_000), st.integers(0, 2_000))
def test_every_byte_is_copied_once_and_the_scratch_is_bounded(
    items: list[tuple[str, list[int], Role]], scratch_bytes: int, small_bytes: int
) -> None:
    manifest = _manifest(items)

    copies = CopyPlan.of(manifest, scratch_bytes, small_bytes)

    assert sorted(_all(copies)) == [index for index, spec in enumerate(manifest.tensors) if spec.nbytes]
    assert copies.scratch_bytes <= scratch_bytes
    covered: dict[int, int] = {}
    for span in (*copies.spans, *copies.scattered):
        for offset in range(span.nbytes):
            assert span.slot + offset not in covered
            covered[span.slot + offset] = span.scratch + offset
    assert len(set(covered.values())) == len(covered)
    for index, place in copies.gathered:
        spec = manifest.tensors[index]
        assert [covered[spec.offset + n] for n in range(spec.nbytes)] == list(range(place, place + spec.nbytes))
        assert place % (spec.nbytes // spec.elements) == 0, "an element lies across its own alignment"


@given(_SPECS, st.integers(0, 20_000), st.integers(0, 2_000))
def test_buffers_are_copied_before_forward(
    items: list[tuple[str, list[int], Role]], scratch_bytes: int, small_bytes: int
) -> None:
    manifest = _manifest(items)

    copies = CopyPlan.of(manifest, scratch_bytes, small_bytes)

    is_buffer = [spec.role in (Role.BUFFER, Role.STRUCTURAL) for spec in manifest.tensors]
    assert not any(is_buffer[index] for index in copies.on_side)
    assert all(is_buffer[index] for index in copies.on_compute)
    assert all(is_buffer[index] or manifest.tensors[index].nbytes <= small_bytes for index, _ in copies.gathered)


def test_thousand_small_tensors_are_one_copy() -> None:
    manifest = _manifest([("F32", [64], Role.PARAM)] * 1000)

    copies = CopyPlan.of(manifest)
    assert (len(copies.spans), len(copies.scattered)) == (1, 0)


def test_short_spans_between_weights_are_one_copy_and_long_ones_one_each() -> None:
    weight, bias, many = ("F32", [100_000], Role.PARAM), ("F32", [300], Role.PARAM), ("F32", [60_000], Role.PARAM)
    manifest = _manifest([*[weight, bias, bias] * 50, *[weight, many, many] * 3])

    copies = CopyPlan.of(manifest)

    assert (len(copies.spans), len(copies.scattered), len(copies.on_side)) == (3, 50, 53)
    assert copies.scattered_bytes <= 50 * (2 * 300 * 4 + 64)
    assert all(span.scratch + span.nbytes <= copies.scattered_bytes for span in copies.scattered)
    assert all(span.scratch >= copies.scattered_bytes for span in copies.spans)


def test_bytes_that_the_host_brings_to_their_places_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_plan, "SCATTERED_BYTES", 10_000)
    copies = CopyPlan.of(_manifest([("F32", [100_000], Role.PARAM), ("F32", [300], Role.PARAM)] * 50))

    assert 0 < copies.scattered_bytes <= 10_000
    assert len(copies.spans) + len(copies.scattered) == 50


def test_at_most_64_mib_of_device_memory_are_used() -> None:
    assert SCRATCH_BYTES + overlapped.BOUNCE_BYTES <= 64 << 20
    assert SMALL_BYTES <= overlapped.BOUNCE_BYTES <= overlapped.PIECE_BYTES


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(8, 300), st.randoms())
def test_pieces_are_the_tensor_in_row_major_order(shape: list[int], nbytes_max: int, random: object) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    whole = torch.arange(math.prod(shape), dtype=torch.float64).view(shape).permute(order)

    parts = list(pieces(whole, nbytes_max))

    assert torch.equal(torch.cat([part.flatten() for part in parts]), whole.flatten())
    assert all(part.nbytes <= nbytes_max for part in parts)


def _odd_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    extra = nn.Module()
    extra.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))
    extra.register_buffer("empty", torch.zeros(0, 4))
    extra.register_buffer("mask", torch.tensor([True, False, True]))
    extra.register_buffer("bf16", torch.randn(5).to(torch.bfloat16))
    extra.register_buffer("words", torch.arange(60_000, 60_007, dtype=torch.int32).to(torch.uint16))
    extra.register_buffer("transposed", torch.arange(6, dtype=torch.int64).view(2, 3).t())
    extra.register_buffer("expanded", torch.ones(1).expand(4))
    extra.register_buffer("holes", torch.tensor([-float("inf"), float("nan"), -0.0]))
    extra.weight = nn.Parameter(torch.randn(9, 7, 5).permute(2, 0, 1))
    extra.sliced = nn.Parameter(torch.randn(9, 70)[:, ::3])
    extra.plain = nn.Parameter(torch.randn(40, 9, dtype=torch.float64))
    return model.append(extra)


@pytest.mark.parametrize("scratch_bytes", [0, 500, 1 << 20])
@pytest.mark.parametrize("small_bytes", [0, 200, 1 << 20])
def test_every_copy_method_equals_a_plain_copy(
    scratch_bytes: int, small_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlapped, "PIECE_BYTES", 300)
    monkeypatch.setattr(overlapped, "BOUNCE_BYTES", 100)
    model = _odd_model()
    plan = Plan.of(model)
    device, (slot, expected) = FakeDevice(), make_slots(plan.manifest.nbytes, 2)
    stager = OverlappedStager(plan.manifest, device, CopyPlan.of(plan.manifest, scratch_bytes, small_bytes))
    CpuStager(plan.manifest).stage(plan.tensors(), expected)

    for _ in range(2):
        slot.tensor.fill_(0xEE)
        transfer = stager.stage(plan.tensors(), slot)
        device.idle()

        assert transfer.wait()
        assert bytes(slot.view) == bytes(expected.view)
    assert sum(device.allocated) <= scratch_bytes + 100


def test_strides_may_change_between_snapshots() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(300, 400))
    plan = Plan.of(module)
    device, (slot,) = FakeDevice(), make_slots(plan.manifest.nbytes, 1)
    stager = OverlappedStager(plan.manifest, device)
    values = module.weight.detach().clone()
    forms: list[Tensor] = [values, values.t().contiguous().t(), values.repeat(1, 2)[:, :400], values]

    for form in forms:
        module.weight.data = form
        slot.tensor.zero_()
        stager.stage(plan.tensors(), slot)
        device.idle()

        assert torch.equal(slot.tensor.view(torch.float32).view(300, 400), values)


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_makes_no_difference_on_a_device(inference: bool) -> None:
    model = nn.Linear(300, 300)
    plan = Plan.of(model)
    device, (slot,) = FakeDevice(), make_slots(plan.manifest.nbytes, 1)
    with torch.inference_mode(inference):
        stager = OverlappedStager(plan.manifest, device)
    for mode in (inference, not inference):
        nn.init.constant_(model.weight, float(mode))
        with torch.inference_mode(mode):
            transfer = stager.stage(plan.tensors(), slot)
        device.idle()

        assert transfer.wait()
        assert slot.tensor.view(torch.float32)[:90_000].unique().tolist() == [float(mode)]
