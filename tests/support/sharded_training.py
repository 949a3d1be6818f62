"""A sharded training in forked ranks: python sharded_training.py '{"endpoint": ..., "world": ...}'.

Each rank streams its shards to a run. After every step the whole weights are gathered; rank 0 records them, and streams
them as the run `RUN-twin`. It prints one line of JSON for each rank.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainer_client import EmaClient

DIM = 6
REPORTED = ("committed", "skipped", "torn", "dropped", "blocked_s_max")


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


class Narrow(nn.Module):
    """Of its parameters the last of four ranks holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 7)
        self.scale = nn.Parameter(torch.ones(2, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.embed(tokens % 3) * self.scale[0] + self.scale[1]
        return logits


class Uneven(nn.Module):
    """Parameters of 9 rows: of those torch reports wrong boxes on a mesh of 4 by 2, for two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, DIM)
        self.up = nn.Linear(DIM, 9)
        self.down = nn.Linear(9, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.down(torch.relu(self.up(self.embed(tokens))))
        return logits


def whole_model(kind: str) -> Model | Narrow | Uneven:
    """The model that is not sharded."""
    if kind == "uneven":
        return Uneven()
    return Narrow() if kind == "narrow" else Model(kind)


def stages(model: Any, rank: int) -> list[nn.Module]:
    """The stages of one of two ranks, with the names of the whole model. The head is not tied across them."""
    kept = (("frozen", "embed", "blocks.0"), ("blocks.1", "norm", "head"))[rank]
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    parts = []
    for name in kept:
        part = nn.Module()
        owner: nn.Module = part
        *path, last = name.split(".")
        for each in path:
            owner.add_module(each, nn.Module())
            owner = owner.get_submodule(each)
        setattr(owner, last, model.frozen if name == "frozen" else model.get_submodule(name))
        parts.append(part)
    return parts


def shard(model: Any, kind: str, world: int) -> Any:
    """Shard the model as `kind` says."""
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        arguments: dict[str, Any] = {"mesh": mesh}
    elif kind == "tensor-parallel":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        arguments = {"mesh": mesh["data"]}
    elif kind == "uneven":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        embed, up = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, mesh["tensor"], {"embed": embed, "up": up})
        arguments = {"mesh": mesh["data"]}
    else:
        arguments = {"mesh": init_device_mesh("cpu", (world,))}
    if kind == "bf16":
        arguments["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "offload":
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind == "columns":
        arguments["shard_placement_fn"] = lambda parameter: Shard(1) if parameter.dim() == 2 else Shard(0)
    for index, block in enumerate(getattr(model, "blocks", ())):
        if kind == "checkpointing":
            model.blocks[index] = checkpoint_wrapper(block)
        if kind == "compiled-blocks":
            model.blocks[index] = torch.compile(block, backend="eager")
        fully_shard(model.blocks[index], **arguments)
    fully_shard(model, **arguments)
    return torch.compile(model, backend="eager") if kind == "compiled" else model


def whole(model: Any, kind: str) -> dict[str, Tensor]:
    """The whole state dict, gathered from all ranks; batch norm's statistics are those of rank 0."""
    if kind == "pipeline":
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, {name: value for part in model for name, value in part.state_dict().items()})
        return {name: value for part in parts for name, value in part.items()}
    return {
        name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): (
            value.full_tensor() if isinstance(value, DTensor) else value
        )
        .detach()
        .clone()
        for name, value in model.state_dict().items()
    }


def loss_of(model: Any, kind: str, rank: int) -> Tensor:
    """The loss of a random batch; a rank of a pipeline trains its stages alone."""
    tokens, labels = torch.randint(0, 7, (8,)), torch.randint(0, 7, (8,))
    if kind != "pipeline":
        return nn.functional.cross_entropy(model(tokens), labels)
    if rank == 0:
        outputs: Tensor = model[2].blocks.get_submodule("0")(model[1].embed(tokens))
        return outputs.square().mean()
    outputs = model[0].blocks.get_submodule("1")(torch.randn(8, DIM))
    return nn.functional.cross_entropy(model[2].head(model[1].norm(outputs)), labels)


def poison(optimizer: torch.optim.Optimizer, after: int, restored: list[tuple[Tensor, Tensor]]) -> None:
    """Have the optimizer's step number `after` leave a NaN in this rank's shard of a parameter."""
    steps = 0

    def hook(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            parameter = optimizer.param_groups[0]["params"][0]
            local = parameter.detach().to_local()
            restored.append((local, local.clone()))
            local.view(-1)[-1] = torch.nan

    optimizer.register_step_post_hook(hook)


class Twin:
    """On rank 0 the run of the whole model; on other ranks nothing."""

    def __init__(self, given: dict[str, Any], rank: int, arguments: dict[str, Any]) -> None:
        self.ema: EmaClient | None = None
        if rank == 0 and given.get("twin", True):
            self.run = f"{given['run']}-twin"
            self.model = whole_model(given["kind"])
            if given["kind"] == "pipeline":
                stages(self.model, rank)  # which unties the head
            self.ema = EmaClient(given["endpoint"], self.run, rank=0, **arguments)

    def call(self, name: str, *arguments: Any) -> Any:
        return True if self.ema is None else getattr(self.ema, name)(*arguments)

    def load(self, step: int) -> None:
        if self.ema is not None:
            self.ema.load_state_dict({"run": self.run, "step": step})

    def update(self, weights: dict[str, Tensor], step: int) -> None:
        if self.ema is not None:
            self.model.load_state_dict(weights)
            self.ema.update(self.model, step)


def take_step(model: Any, optimizer: torch.optim.Optimizer, given: dict[str, Any], rank: int) -> None:
    """One optimizer step, of two batches with `accumulate`."""
    batches = 2 if given.get("accumulate") else 1
    for batch in range(batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(batch == batches - 1)
        loss_of(model, given["kind"], rank).backward()
    optimizer.step()
    optimizer.zero_grad()


def wait_at(folder: str, point: object, rank: int, ema: EmaClient | None) -> None:
    """Say in `folder` that this rank has come to `point`, if given once all is sent, and wait until it may go on."""
    assert ema is None or ema.flush()
    name = f"{point}-{rank}"
    Path(folder, f"reached-{name}").touch()
    while not Path(folder, f"go-{name}").exists():
        time.sleep(0.01)


def train(given: dict[str, Any], rank: int) -> dict[str, Any]:
    kind, world, run = given["kind"], given["world"], given["run"]
    torch.manual_seed(given.get("seed", 0))
    model: Any = whole_model(kind)
    model = stages(model, rank) if kind == "pipeline" else shard(model, kind, world)
    parameters = [p for part in (model if kind == "pipeline" else [model]) for p in part.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.05)
    arguments = {"averages": ["raw", "ema:0.9"], "when_behind": "wait"} | given.get("client", {})
    twin = Twin(given, rank, arguments)
    endpoint = given.get("endpoint_of", {}).get(str(rank), given["endpoint"])
    ema = EmaClient(endpoint, run, **arguments | given.get("client_of", {}).get(str(rank), {}))
    first = given.get("first_step", 1)
    if first > 1:
        ema.load_state_dict({"run": run, "step": first - 1})
        twin.load(first - 1)
    restored: list[tuple[Tensor, Tensor]] = []
    if "nan" in given and given["nan"][0] == rank:
        poison(optimizer, given["nan"][1], restored)
    ema.attach(model, optimizer)
    weights: dict[int, dict[str, Tensor]] = {}
    step, answers, rewind = first - 1, [], given.get("rewind")
    while step < first - 1 + given["steps"]:
        step += 1
        # The ranks of tensor parallelism train on the same samples.
        torch.manual_seed(1000 * step + (rank // 2 if kind in ("tensor-parallel", "uneven") else rank))
        take_step(model, optimizer, given, rank)
        if step in given.get("wait_at", ()):
            wait_at(given["folder"], step, rank, ema if step == 1 else None)
        for local, before in restored:
            local.copy_(before)
        restored.clear()
        now = whole(model, kind) if given.get("gather", True) else {}
        weights[step] = now
        twin.update(now, step)
        if given.get("kill") == [rank, step]:
            os.kill(os.getpid(), 9)
        if given.get("evaluate"):
            with torch.no_grad():
                model.eval()(torch.randint(0, 7, (8,)))
            model.train()
        if given.get("checkpoint") == step:
            answers.append(ema.checkpoint(step) and twin.call("checkpoint", step))
        if rewind is not None and step == rewind[0]:
            step, rewind = rewind[1], None
            ema.load_state_dict({"run": run, "step": step})
            twin.load(step)
    if "end" in given.get("wait_at", ()):
        wait_at(given["folder"], "end", rank, ema)
    end = "finish" if given.get("finish", True) else "flush"
    done = getattr(ema, end)() and twin.call(end)
    stats = ema.stats()
    if rank == 0 and "weights" in given:
        torch.save(weights, given["weights"])
    return {
        "rank": rank,
        "done": done,
        "answers": answers,
        "steps": ema.steps,
        **{name: stats.get(name) for name in REPORTED},
    }


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
