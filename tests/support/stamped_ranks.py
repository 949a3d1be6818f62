"""Ranks of a sharded training whose weights after step N are a function of N: python stamped_ranks.py '{...}'.

The ranks are forked, train without communication at a fixed pace, and end after the step in the file `end`. If one of
them is killed, all are ended and started again with the next incarnation, from the step of the newest checkpoint.
Under torchrun, which does the same, this process is one rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from support.in_namespace import enter_namespace
from trainer_client import EmaClient
from trainer_client.ranks import place_of

RUN = "ranks"
DECAY = 0.9
NAN_EVERY = 17  # one rank has a NaN in its shard at each multiple of this step
CHECKPOINT_EVERY = 10
BOUND_S = 5.0  # longer steps are reported

_SHAPES = {"up.weight": (8, 5), "up.bias": (8,), "down.weight": (5, 8), "start": (9,)}


class Stamped(nn.Module):
    """Parameters that do not divide by 3 ranks; `start` also depends on the start of the training."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 5, bias=False)
        self.start = nn.Parameter(torch.zeros(9))


def value_at(step: int) -> float:
    """The value of all elements after a step; a float32 number."""
    return step * 37 % 101 / 16 - 3


def weights_at(step: int) -> dict[str, Tensor]:
    """The whole weights after a step of the first start."""
    return {name: torch.full(shape, value_at(step)) for name, shape in _SHAPES.items()}


class Stamping(Optimizer):
    """Writes the weights of the next step."""

    def __init__(self, parameters: Iterable[Tensor], last: Tensor, step: int, incarnation: int, rank: int) -> None:
        super().__init__(parameters, {})
        self._last, self._incarnation, self._rank = last, incarnation, rank
        self._world = dist.get_world_size()
        self.steps = step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(value_at(self.steps) + (self._incarnation if parameter is self._last else 0))
        if self.steps % NAN_EVERY == 0 and self.steps % self._world == self._rank:
            parameter = self.param_groups[0]["params"][0]
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.view(-1)[-1] = float("nan")


def _report(**values: Any) -> None:
    os.write(1, (json.dumps(values) + "\n").encode())  # whole lines, whatever other ranks print


def _end_of(folder: Path) -> int:
    try:
        return int((folder / "end").read_text())
    except FileNotFoundError:
        return sys.maxsize


def train(given: dict[str, Any], rank: int, incarnation: int) -> None:
    """One rank."""
    folder = Path(given["folder"])
    checkpoint = folder / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    world = dist.get_world_size()
    model = Stamped()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = Stamping(model.parameters(), model.start, step, incarnation, rank)
    dist.barrier()  # all have read the checkpoint
    if "namespaces" in given:
        enter_namespace(given["namespaces"][rank])
    averages = ["raw", f"ema:{DECAY}"]
    ema = EmaClient(given["endpoint"], RUN, averages=averages, incarnation=incarnation, connect_timeout_s=60.0)
    if step:
        ema.load_state_dict({"run": RUN, "step": step})
    ema.attach(model, optimizer)
    _report(rank=rank, pid=os.getpid(), incarnation=incarnation, gang=place_of(incarnation).gang)
    begun, pace, first = time.monotonic(), given.get("pace", 0.02), step
    while step < _end_of(folder):
        time.sleep(max(0.0, begun + (step - first) * pace - time.monotonic()))
        entered = time.monotonic()
        optimizer.step()
        step += 1
        if (took := time.monotonic() - entered) > BOUND_S:
            _report(slow=took, step=step, pid=os.getpid())
        if step % CHECKPOINT_EVERY == 0:
            (folder / f"step-{rank}").write_text(str(step))
        # A run can go back only to a generation; without a server there is none, and no checkpoint here.
        if step % CHECKPOINT_EVERY == 0 and ema.checkpoint(step, timeout_s=5.0) and rank == 0:
            (folder / "checkpoint.new").write_text(str(step))
            (folder / "checkpoint.new").rename(checkpoint)
        if given.get("kill") == [rank, step] and incarnation == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    done = ema.finish()
    stats = ema.stats()
    _report(rank=rank, done=done, steps=step, stats={name: stats[name] for name in ("committed", "skipped", "torn")})


def _fork(given: dict[str, Any], rank: int, incarnation: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        store = f"file://{given['folder']}/store-{incarnation}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=given["world"])
        train(given, rank, incarnation)
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def main() -> None:
    given = json.loads(sys.argv[1])
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        train(given, dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
        dist.destroy_process_group()
        return
    incarnation = 0
    children = {_fork(given, rank, 0) for rank in range(given["world"])}
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status == 0:
            continue
        for other in children:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(1)
        incarnation += 1
        children = {_fork(given, rank, incarnation) for rank in range(given["world"])}


if __name__ == "__main__":
    main()
