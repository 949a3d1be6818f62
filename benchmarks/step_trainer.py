"""The trainer of the step time benchmark, in a process of its own: one JSON line per round.

Takes the server's address, the model's width, and which cores compute and which send. Prints, for each way of
keeping an average, seconds per step, seconds per step in our code, and the share of snapshots that was skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch

from benchmarks.machine import pinned
from benchmarks.models import step, trained
from benchmarks.rival import ModelEma
from trainer_client import EmaClient

_WARM_STEPS = 2  # after these, a snapshot in transfer at the start of the measurement offsets the one at its end
_FLUSH_S = 60.0

Way = Literal["skip", "wait"]
Arm = Callable[[], AbstractContextManager[Callable[[], None]]]

WAYS: tuple[Way, ...] = ("skip", "wait")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    for name in ("width", "batch", "tokens", "rounds", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("compute", "send"):
        parser.add_argument(f"--{name}", type=json.loads, required=True, help="cores, as a JSON list")
    args = parser.parse_args()
    with ExitStack() as stack:
        clients = {name: stack.enter_context(_client(args.endpoint, name, frozenset(args.send))) for name in WAYS}
        os.sched_setaffinity(0, args.compute)
        torch.set_num_threads(len(args.compute))
        _measure(clients, args)


@contextmanager
def _client(endpoint: str, way: Way, cores: frozenset[int]) -> Iterator[EmaClient]:
    """A client whose threads run on `cores`; left without publishing."""
    with pinned(cores):
        client = EmaClient(endpoint, run=f"bench-{way}", averages=["ema:0.9999"], when_behind=way)
    try:
        yield client
    finally:
        client.close()


def _measure(clients: Mapping[Way, EmaClient], args: argparse.Namespace) -> None:
    model, optimizer, patches = trained(args.width, args.batch, args.tokens)
    rival = ModelEma(model)

    @contextmanager
    def called(after: Callable[[], None]) -> Iterator[Callable[[], None]]:
        yield after

    @contextmanager
    def attached(client: EmaClient) -> Iterator[Callable[[], None]]:
        handle = client.attach(model, optimizer)
        yield lambda: None
        handle.remove()

    arms: dict[str, Arm] = {
        "none": lambda: called(lambda: None),
        "rival": lambda: called(lambda: rival.update(model)),
        "attach": lambda: attached(clients["skip"]),
        "update": lambda: called(lambda: clients["skip"].update(model)),
        "attach, wait": lambda: attached(clients["wait"]),
    }

    def one(name: str, steps: int) -> dict[str, float]:
        client = clients["wait" if "wait" in name else "skip"]
        with arms[name]() as after:
            found = _block(lambda: step(model, optimizer, patches), after, client, steps)
        client.flush(_FLUSH_S)  # no transfer of this arm overlaps the next
        return found

    for turn in range(args.rounds + 1):
        found = {name: one(name, args.steps if turn else 1) for name in arms}
        if turn:
            print(json.dumps(found), flush=True)


def _block(train: Callable[[], None], after: Callable[[], None], client: EmaClient, steps: int) -> dict[str, float]:
    for _ in range(_WARM_STEPS):
        train()
        after()
    before, started = client.stats(), time.perf_counter()
    for _ in range(steps):
        train()
        after()
    seconds, now = time.perf_counter() - started, client.stats()
    return {
        "step_s": seconds / steps,
        "blocked_s": (now["blocked_s_total"] - before["blocked_s_total"]) / steps,
        "skipped": (_skipped(now) - _skipped(before)) / steps,
    }


def _skipped(stats: Mapping[str, Any]) -> int:
    return int(sum(stats["skipped"].values()))


if __name__ == "__main__":
    main()
