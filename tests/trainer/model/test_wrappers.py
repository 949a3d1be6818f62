"""Wrapped models stream under the names of the model inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import SGD

from support.fake_worker import OfflineClient
from trainer_client.errors import PlanError
from trainer_client.model.plan import Plan


class Net(nn.Module):
    """A model with a submodule of the user's own called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.block: nn.Module = nn.Linear(2, 2)
        self.tail: nn.Module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tail(self.block(self.module(x)))
        return out


PLAIN = list(Net().state_dict())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _compiled(model: nn.Module) -> nn.Module:
    compiled: object = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    return compiled


def _names(model: nn.Module) -> list[str]:
    return [spec.name for spec in Plan.of(model).manifest.tensors]


def test_own_submodule_called_module_keeps_its_name() -> None:
    assert _names(Net()) == PLAIN
    assert "module.weight" in PLAIN


@pytest.mark.usefixtures("one_process")
def test_ddp_prefix_is_dropped() -> None:
    assert _names(DistributedDataParallel(Net())) == PLAIN


@pytest.mark.usefixtures("one_process")
def test_ddp_model_is_sent_after_each_step() -> None:
    model = Net()
    ddp = DistributedDataParallel(model)
    optimizer = SGD(ddp.parameters(), lr=0.1)
    client = OfflineClient("tcp://127.0.0.1:5555", run="r")
    client.attach(ddp, optimizer)

    ddp(torch.ones(3, 2)).square().sum().backward()
    optimizer.step()

    sent = client.worker.sent(0)
    assert all(torch.equal(sent[name], tensor) for name, tensor in model.state_dict().items())


def test_data_parallel_prefix_is_dropped() -> None:
    assert _names(DataParallel(Net())) == PLAIN


def test_compile_prefix_is_dropped() -> None:
    assert _names(_compiled(Net())) == PLAIN


def test_activation_checkpointing_prefix_is_dropped() -> None:
    assert _names(checkpoint_wrapper(Net())) == PLAIN


@pytest.mark.usefixtures("one_process")
def test_prefixes_of_nested_and_inner_wrappers_are_dropped() -> None:
    model = Net()
    model.block = checkpoint_wrapper(model.block)
    model.tail = _compiled(model.tail)

    assert _names(_compiled(DistributedDataParallel(model))) == PLAIN


def test_tensors_of_a_wrapped_model_are_those_of_the_inner_model() -> None:
    model = Net()
    plan = Plan.of(_compiled(model))

    assert plan.tensors()[0] is model.module.weight


def test_duplicate_tensor_names_are_refused() -> None:
    class Odd(DataParallel):  # type: ignore[type-arg]
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.tail = nn.Sequential(nn.Linear(1, 1))

    with pytest.raises(PlanError, match=r"'tail\.0\.weight'"):
        Plan.of(Odd(Net()))


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")
def test_fsdp1_model_is_refused_with_alternatives() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))

    with pytest.raises(PlanError, match=r"'0'.*FullyShardedDataParallel.*rank 0") as caught:
        Plan.of(nn.Sequential(inner))
    assert "update()" in str(caught.value)


def test_parameters_of_zero3_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    vars(next(model.parameters()))["ds_id"] = (
        0  # what DeepSpeed adds when it leaves only a placeholder in the parameter
    )

    with pytest.raises(PlanError, match=r"'0\.weight' is sharded \(DeepSpeed ZeRO-3\)"):
        Plan.of(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")
def test_sharded_tensors_on_a_mesh_of_one_are_whole() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import distribute_module
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import distribute_module  # type: ignore[attr-defined]

    model = distribute_module(nn.Sequential(nn.Linear(2, 2)), init_device_mesh("cpu", (1,)))

    plan = Plan.of(model)

    assert plan.manifest == Plan.of(nn.Sequential(nn.Linear(2, 2))).manifest
    assert [tensor.shape for tensor in plan.tensors()] == [(2, 2), (2,)]
