"""A sharded training in forked ranks: python sharded_training.py '{"endpoint": ..., "world": ...}'.

Each rank streams its shards to a run. After every step the whole weights are gathered; rank 0 records them, and streams
them as the run `RUN-twin`. It prints one line of JSON for each rank.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainer_client import EmaClient

DIM = 6


class Block(nn.Module):
    """Two layers of unequal sizes, one of which does not divide by the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 8)
        self.down = nn.Linear(8, DIM)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scale * self.down(torch.relu(self.up(x)))
        return y


class Model(nn.Module):
    """Tied weights, batch norm (which does not accept bfloat16 beside its float32 statistics), a frozen parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, DIM)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(DIM) if kind == "bf16" else nn.BatchNorm1d(DIM)
        self.frozen = nn.Parameter(torch.randn(5, 4), requires_grad=False)
        self.head = nn.Linear(DIM, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def shard(model: Model, kind: str, world: int) -> Model:
    """Shard the model as `kind` says."""
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        arguments: dict[str, Any] = {"mesh": mesh}
    elif kind == "tensor-parallel":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        arguments = {"mesh": mesh["data"]}
    else:
        arguments = {"mesh": init_device_mesh("cpu", (world,))}
    if kind == "bf16":
        arguments["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "offload":
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind == "columns":
        arguments["shard_placement_fn"] = lambda parameter: Shard(1) if parameter.dim() == 2 else Shard(0)
    for block in model.blocks:
        fully_shard(block, **arguments)
    fully_shard(model, **arguments)
    return model


def whole(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """The whole state dict, gathered from all ranks; batch norm's statistics are those of rank 0."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def train(given: dict[str, Any], rank: int) -> dict[str, Any]:
    world, steps, run = given["world"], given["steps"], given["run"]
    torch.manual_seed(given.get("seed", 0))
    model = shard(Model(given["kind"]), given["kind"], world)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    arguments = {"averages": ["raw", "ema:0.9"], "when_behind": "wait"} | given.get("client", {})
    ema = EmaClient(given["endpoint"], run, **arguments)
    first = given.get("first_step", 1)
    if first > 1:
        ema.load_state_dict({"run": run, "step": first - 1})
    twin = copy = None
    if rank == 0 and given.get("twin", True):
        copy = Model(given["kind"])
        twin = EmaClient(given["endpoint"], f"{run}-twin", rank=0, **arguments)
        if first > 1:
            twin.load_state_dict({"run": f"{run}-twin", "step": first - 1})
    ema.attach(model, optimizer)
    weights: list[dict[str, Tensor]] = []
    for step in range(first, first + steps):
        # The ranks of tensor parallelism train on the same samples.
        torch.manual_seed(1000 * step + (rank // 2 if given["kind"] == "tensor-parallel" else rank))
        loss = nn.functional.cross_entropy(model(torch.randint(0, 7, (8,))), torch.randint(0, 7, (8,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = whole(model, rank)
        weights.append(now)
        if twin is not None and copy is not None:
            copy.load_state_dict(now)
            twin.update(copy, step)
        if given.get("kill") == [rank, step]:
            os.kill(os.getpid(), 9)
    finish = given.get("finish", True)
    done = ema.finish() if finish else ema.flush()
    if twin is not None:
        done = (twin.finish() if finish else twin.flush()) and done
    stats = ema.stats()
    if rank == 0 and "weights" in given:
        torch.save(weights, given["weights"])
    return {"rank": rank, "done": done, "committed": stats.get("committed"), "stats": str(stats)}


def main() -> None:
    given = json.loads(sys.argv[1])
    folder = tempfile.mkdtemp()
    children = {}
    for rank in range(given["world"]):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=given["world"]
                )
                os.write(1, (json.dumps(train(given, rank)) + "\n").encode())  # whole lines, whatever other ranks print
                status = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        children[pid] = rank
    failed = []
    while children:
        pid, status = os.wait()
        rank = children.pop(pid)
        if status:
            failed.append(rank)
            for other in children:  # the others wait for it in a collective operation
                os.kill(other, 9)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
