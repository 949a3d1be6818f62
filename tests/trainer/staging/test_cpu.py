"""The copy into a slot: exact bytes of any plain tensor, and nothing of the model's afterwards."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from support.snapshots import decode
from trainer_client import PlanError
from trainer_client.model.plan import Plan
from trainer_client.staging.cpu import LARGE_BYTES, CpuStager, slot_views
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
    slot = torch.empty(plan.manifest.nbytes, dtype=torch.uint8)  # its pages are not there, but the last one

    (_, view) = slot_views(slot, [(spec, spec.offset) for spec in plan.manifest.tensors])
    view.copy_(last)

    assert plan.manifest.tensors[1].offset == 2**31 + 5
    assert slot[2**31 + 5 :].tolist() == [7, 7, 7]


_LARGE = LARGE_BYTES // 4  # elements of float32
_KINDS = {"large": (_LARGE,), "in a run": (3, 5), "alone": (7,)}


def _every_way() -> nn.ParameterDict:
    """Parameters that are copied in each of the three ways, on the CPU."""
    model = nn.ParameterDict({"large": torch.randn(_LARGE), "alone": torch.randn(7)})
    model.update({f"run {index}": torch.randn(3, 5) for index in range(5)})
    model["in a run"] = torch.randn(3, 5)
    return model


def _assert_staged(model: nn.Module, plan: Plan, stager: CpuStager, slot: Slot) -> None:
    slot.tensor.fill_(255)
    plan = plan.renewed(model)
    stager.stage(plan.live(), slot, plan.check)
    staged = decode(plan.manifest, slot.view)
    for name, tensor in model.state_dict().items():
        assert torch.equal(staged[name], tensor), name


def _assign_data(model: nn.Module, name: str) -> None:
    parameter = model.get_parameter(name)
    parameter.data = torch.randn(parameter.shape)


def _assign_data_of_another_layout(model: nn.Module, name: str) -> None:
    parameter = model.get_parameter(name)
    parameter.data = torch.randn(*parameter.shape, 2)[..., 1]


def _expand_the_first_value(model: nn.Module, name: str) -> None:
    parameter = model.get_parameter(name)
    parameter.data = parameter.data[(0,) * parameter.dim()].expand(parameter.shape)


def _load_by_assignment(model: nn.Module, name: str) -> None:
    state = model.state_dict()
    model.load_state_dict(state | {name: torch.randn(state[name].shape)}, assign=True)


def _resize_there_and_back(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        parameter, shape = model.get_parameter(name), model.get_parameter(name).shape
        parameter.data.resize_(16 * parameter.numel()).resize_(shape)
        parameter.normal_()


def _free_and_fill_the_storage(model: nn.Module, name: str) -> None:
    parameter = model.get_parameter(name)
    storage, nbytes = parameter.untyped_storage(), parameter.untyped_storage().nbytes()
    storage.resize_(0)
    torch.empty(nbytes)  # another address for the next one
    storage.resize_(nbytes)
    nn.init.normal_(parameter)


def _swap(model: nn.Module, name: str) -> None:
    torch.utils.swap_tensors(model.get_parameter(name), nn.Parameter(torch.randn(model.get_parameter(name).shape)))


def _replace_the_parameter(model: nn.Module, name: str) -> None:
    model._parameters[name] = nn.Parameter(torch.randn(model.get_parameter(name).shape))


def _negate_lazily(model: nn.Module, name: str) -> None:
    model.get_parameter(name).data = torch._neg_view(torch.randn(model.get_parameter(name).shape))


@pytest.mark.parametrize("name", _KINDS)
@pytest.mark.parametrize(
    "change",
    [
        _assign_data,
        _assign_data_of_another_layout,
        _expand_the_first_value,
        _load_by_assignment,
        _resize_there_and_back,
        _free_and_fill_the_storage,
        _swap,
        _replace_the_parameter,
        _negate_lazily,
    ],
)
def test_tensors_that_moved_between_two_snapshots_are_read_where_they_are(
    name: str, change: Callable[[nn.Module, str], None]
) -> None:
    model = _every_way()
    plan, stager, slot = _filled(model)

    change(model, name)

    _assert_staged(model, plan, stager, slot)


@pytest.mark.parametrize("name", _KINDS)
def test_weights_tied_after_the_first_snapshot_are_read_where_they_are(name: str) -> None:
    model = _every_way()
    model["other"] = torch.randn(_KINDS[name])
    plan, stager, slot = _filled(model)

    model._parameters["other"] = model._parameters[name]

    _assert_staged(model, plan, stager, slot)


def _change_data(model: nn.Module, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> None:
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = change(parameter.data)


@pytest.mark.parametrize(
    "names",
    [["large"], ["alone"], ["in a run"], ["run 0"], [*(f"run {index}" for index in range(5)), "in a run"]],
    ids=["large", "alone", "last of a run", "first of a run", "a whole run"],
)
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.flatten()[:-1].clone(),
        lambda data: data.unsqueeze(0),
        lambda data: data.flatten().repeat(2),
        lambda data: data.to(torch.bfloat16),
        lambda data: data.view(torch.int32),
    ],
    ids=["fewer", "another shape", "more", "another dtype", "another dtype of that size"],
)
def test_tensor_that_changed_in_place_is_refused_by_name(
    names: list[str], change: Callable[[Tensor], Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    model = _every_way().requires_grad_(False)
    plan, stager, slot = _filled(model)

    _change_data(model, names, change)

    with pytest.raises(PlanError, match=f"tensor '{names[0]}' is torch"):
        stager.stage(plan.renewed(model).live(), slot, plan.check)
    assert not recwarn.list


def test_memory_that_was_freed_is_an_error_and_not_read() -> None:
    model = _every_way()
    plan, stager, slot = _filled(model)
    model.get_parameter("large").untyped_storage().resize_(0)

    with pytest.raises(RuntimeError, match="has 0 in memory"):
        stager.stage(plan.tensors(), slot)


@pytest.mark.parametrize("name", _KINDS)
def test_subclass_of_a_parameter_is_copied_by_its_own_rules(name: str) -> None:
    class Counting(nn.Parameter):
        """Has no address that may be read."""

        def data_ptr(self) -> int:
            raise AssertionError("its address was read")

    model = _every_way()
    model._parameters[name] = Counting(torch.randn(_KINDS[name]))

    plan, stager, slot = _filled(model)

    _assert_staged(model, plan, stager, slot)


def test_large_tensors_are_copied_by_the_calling_thread_alone() -> None:
    model = nn.ParameterList([torch.randn(1 << 20) for _ in range(8)])
    plan, stager, slot = _filled(model)
    tensors, targets = plan.tensors(), slot_views(slot.tensor, [(s, s.offset) for s in plan.manifest.tensors])
    threads = torch.get_num_threads()

    def by_torch() -> None:
        with torch.no_grad():
            torch._foreach_copy_(targets, tensors)

    torch.set_num_threads(4)
    try:
        used = {
            name: _other_threads_s(copy)
            for name, copy in (("torch", by_torch), ("ours", partial(stager.stage, tensors, slot)))
        }
    finally:
        torch.set_num_threads(threads)

    assert used["ours"] <= 0.1 * used["torch"]


def _other_threads_s(copy: Callable[[], None]) -> float:
    """CPU seconds of all other threads of the process while this one copies, 20 times."""
    copy()
    begin = time.process_time() - time.thread_time()
    for _ in range(20):
        copy()
    return time.process_time() - time.thread_time() - begin
