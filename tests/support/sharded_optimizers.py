"""Run by torchrun: on rank 0, are the weights of each step sent after the ranks have exchanged them?

ZeroRedundancyOptimizer trains on the batches of plain SGD, so that the weights of the other rank's shard are known.
PostLocalSGDOptimizer trains each rank on other batches, so that the average over the ranks changes the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.optim import SGD, Optimizer

from support.fake_worker import OfflineClient
from trainer_client import SettingsError

_STEPS = 4


def _zero(model: nn.Module) -> Optimizer:
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=SGD, lr=0.1, momentum=0.9)


def _post_local(model: nn.Module) -> Optimizer:
    local = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return PostLocalSGDOptimizer(local, PeriodicModelAverager(period=2, warmup_steps=0))


def _step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


def _is_right(make: Callable[[nn.Module], Optimizer], run: str) -> bool:
    """Whether each step was sent once, with the weights that the model has after it, and these are right."""
    is_sharded = make is _zero
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    optimizer, reference = make(model), SGD(plain.parameters(), lr=0.1, momentum=0.9)
    client = OfflineClient("tcp://127.0.0.1:5555", run=run)
    client.attach(model, optimizer)
    right = True
    for step in range(1, _STEPS + 1):
        batch = torch.randn(3, 4)
        _step(plain, reference, batch)
        _step(model, optimizer, batch if is_sharded else batch * (1 + distributed.get_rank()))
        if distributed.get_rank() == 0:
            sent = client.worker.sent(-1)
            weights = plain.state_dict()
            right &= client.worker.steps == list(range(1, step + 1))
            right &= not is_sharded or all(torch.allclose(sent[name], weights[name]) for name in weights)
            right &= all(torch.equal(sent[name], tensor) for name, tensor in model.state_dict().items())
    return right and client.steps == _STEPS


def _is_refused() -> bool:
    model = nn.Linear(4, 2)
    overlapping = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=SGD, lr=0.1, overlap_with_ddp=True)
    try:
        OfflineClient("tcp://127.0.0.1:5555", run="overlapping").attach(model, overlapping)
    except SettingsError as error:
        return "overlap_with_ddp=True steps inside backward(): call update(model, step)" in str(error)
    return False


def main() -> None:
    distributed.init_process_group("gloo")
    for name, make in (("ZeroRedundancyOptimizer", _zero), ("PostLocalSGDOptimizer", _post_local)):
        if _is_right(make, name):
            print(f"rank {distributed.get_rank()}: {name} is followed")
    if _is_refused():
        print(f"rank {distributed.get_rank()}: overlap_with_ddp is refused")
    distributed.barrier()  # no rank leaves while another one still exchanges
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
