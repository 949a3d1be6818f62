"""Which weights fit a module, and that they are written in place or not at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer_client import PlanError
from trainer_client.pulling.tensors import check_fit, copy_into, shown, tensors_of


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 3) for name, tensor in module.state_dict().items()}


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_written_into_the_same_memory_in_the_modules_dtype(dtype: torch.dtype) -> None:
    module = _net().to(dtype)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in module.state_dict().items()}

    copy_into(module, _weights(_net()))

    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in module.state_dict().items()} == before
    assert all(bool(torch.all(tensor == 3)) for tensor in module.state_dict().values())


def test_parameters_stay_trainable_leaves_and_get_no_graph() -> None:
    module = _net()
    copy_into(module, _weights(module))

    assert all(parameter.is_leaf and parameter.requires_grad for parameter in module.parameters())


def test_names_are_those_inside_wrappers() -> None:
    module = _net()
    copy_into(nn.DataParallel(module), _weights(_net()))

    assert bool(torch.all(module.state_dict()["0.weight"] == 3))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"0.weight": torch.ones(3, 3)}, r"'0.weight' is \[3, 3\] in the average and \[3, 2\] in the module"),
        ({"2.weight": torch.ones(3)}, "'2.weight' is not in the module"),
    ],
)
def test_weights_that_do_not_fit_write_nothing(change: dict[str, Tensor], problem: str) -> None:
    module = _net()
    before = copy.deepcopy(module.state_dict())

    with pytest.raises(PlanError, match=problem):
        copy_into(module, _weights(module) | change)

    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_tensors_that_the_average_lacks_are_named() -> None:
    shapes = {f"t{number}": torch.Size([1]) for number in range(6)}
    missing = check_fit({"t0": torch.ones(1)}, shapes)

    assert missing == ["t1", "t2", "t3", "t4", "t5"]
    assert shown(missing) == "'t1', 't2', 't3' and 2 more"


def test_module_on_the_meta_device_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"tensor 'weight': it is on the meta device"):
        tensors_of(nn.Linear(2, 2, device="meta"))


def test_module_without_tensors_is_refused() -> None:
    with pytest.raises(PlanError, match="without parameters and buffers"):
        tensors_of(nn.ReLU())
