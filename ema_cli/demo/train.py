"""The demo's trainer: streams its snapshots to a server and can record them. Progress goes to stdout as JSON lines.

The recipe benefits from averaging: a constant high learning rate, batches of 8 images, and RMSprop with momentum and
weight decay, so that the last weights oscillate around the solution.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ema_cli.demo.digits import DigitNet, load
from ema_cli.demo.record import RecordWriter
from trainer_client import EmaClient

AVERAGES = ("raw", "ema:0.9", "ema:0.99", "ema:0.999")
_BATCH_IMAGES = 8
_REPORT_STEPS = 25


@dataclass(frozen=True, slots=True)
class Job:
    """What to train: the server (None: `EMA_ENDPOINT`), the run's name, steps, seed, and the folder of the record."""

    endpoint: str | None
    run: str
    steps: int
    seed: int
    record: Path | None


def train(job: Job) -> dict[str, Any]:
    """Train and stream every step; returns `EmaClient.stats()`.

    Raises:
        RuntimeError: the run could not be finished on the server.
    """
    torch.manual_seed(job.seed)
    torch.set_num_threads(1)  # the network is too small to profit from a second thread
    digits, model = load(), DigitNet()
    optimizer = _optimizer(model)
    client = EmaClient(job.endpoint, run=job.run, averages=AVERAGES, when_behind="wait")
    client.attach(model, optimizer)
    with nullcontext() if job.record is None else RecordWriter(job.record) as record:
        for step in range(1, job.steps + 1):
            batch = torch.randint(len(digits.train_labels), (_BATCH_IMAGES,))
            optimizer.zero_grad()
            loss = cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            loss.backward()
            optimizer.step()
            if record is not None:
                record.append(model.state_dict())
            if step % _REPORT_STEPS == 0 or step == job.steps:
                print(json.dumps({"step": step, "loss": loss.item()}), flush=True)
    if not client.finish():
        raise RuntimeError(f"the server did not finish run {job.run!r}: {client.stats()}")
    return client.stats()


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)


def parse(arguments: list[str] | None = None) -> Job:
    """Read the command line of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint")
    parser.add_argument("--run", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--record", type=Path)
    return Job(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    print(json.dumps({"stats": train(parse())}), flush=True)
