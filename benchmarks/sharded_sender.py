"""One rank of the benchmark of sharded trainers, in a process of its own: it streams when the pipe asks for it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.models import Transformer
from trainer_client import EmaClient

Way = Literal["skip", "wait"]
Boxes = Literal["rows", "columns"]

WAYS: tuple[Way, ...] = ("skip", "wait")


@dataclass(frozen=True, slots=True)
class Sender:
    """What a rank streams: its shards of a model on `width`, as one of `world`; the whole model if that is 1."""

    endpoint: str
    run: str
    width: int
    rank: int
    world: int
    boxes: Boxes
    store: Path


@dataclass(frozen=True, slots=True)
class Order:
    """Take so many steps of `step_s` seconds, and stream after each, with the client that skips or that waits."""

    way: Way
    steps: int
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """The seconds until the last snapshot was applied, and the steps that did not count."""

    seconds: float
    skipped: int
    dropped: int


def main(sender: Sender, pipe: Connection) -> None:
    """Follow orders until the pipe is closed. The first message says that the runs are joined."""
    torch.set_num_threads(1)
    logging.getLogger("ema").setLevel(logging.ERROR)  # skipped and dropped steps are counted
    distributed.init_process_group("gloo", init_method=sender.store.as_uri(), rank=sender.rank, world_size=sender.world)
    model = _sharded(Transformer(sender.width), sender)
    clients = {
        way: EmaClient(sender.endpoint, f"{sender.run}-{way}", ["ema:0.9999"], when_behind=way, lane="zmq")
        for way in WAYS
    }
    taken = dict.fromkeys(clients, 0)
    for client in clients.values():  # joins
        client.set(model)
        client.flush()
    pipe.send(None)
    try:
        while True:
            order = pipe.recv()
            pipe.send(_follow(order, clients[order.way], model, taken[order.way]))
            taken[order.way] += order.steps
    except EOFError:
        for client in clients.values():
            client.close()


def _sharded(model: nn.Module, sender: Sender) -> nn.Module:
    if sender.world == 1:
        return model
    dimension = 1 if sender.boxes == "columns" else 0
    from torch.distributed.fsdp import fully_shard  # torch 2.6 or newer, as the next
    from torch.distributed.tensor import Shard

    fully_shard(
        model,
        mesh=init_device_mesh("cpu", (sender.world,)),
        shard_placement_fn=lambda parameter: Shard(dimension if parameter.dim() == 2 else 0),
    )
    return model


def _follow(order: Order, client: EmaClient, model: nn.Module, taken: int) -> Report:
    before, started = _lost(client), time.perf_counter()
    for step in range(taken + 1, taken + order.steps + 1):
        if order.step_s:
            time.sleep(order.step_s)
            distributed.barrier()  # the ranks of a training wait for each other in every step
        client.update(model, step)
    client.flush()
    seconds, after = time.perf_counter() - started, _lost(client)
    return Report(seconds, after[0] - before[0], after[1] - before[1])


def _lost(client: EmaClient) -> tuple[int, int]:
    """Steps that this rank has skipped, and those that the server has dropped."""
    stats = client.stats()
    return sum(stats["skipped"].values()), sum(stats["dropped"].values())
