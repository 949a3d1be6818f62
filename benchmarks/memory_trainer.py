"""The trainer of the memory benchmark, in a process of its own: one JSON line with bytes.

Takes the server's address and process id, the model's width, and how many averages and snapshots. Prints what
the snapshots take, and by how much the memory of this process and of the server grew, at its highest.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.models import Transformer, parameter_bytes
from benchmarks.served import pss_bytes
from trainer_client import EmaClient

AVERAGES = ("ema:0.99", "ema:0.999", "ema:0.9999")
_SNAPSHOTS = 8
_LOOK_EVERY_S = 0.02


def main() -> None:
    """Stream, publish, and report."""
    endpoint, server, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = Transformer(width)
    with torch.no_grad():  # what torch takes once for its own threads is not ours
        torch._foreach_mul_(list(model.parameters()), 1.0)
    idle = {"server": pss_bytes(server), "trainer": pss_bytes(os.getpid())}
    with _highest(server=server, trainer=os.getpid()) as highest:
        client = EmaClient(endpoint, run="memory", averages=AVERAGES, when_behind="wait", lane="zmq")
        for _ in range(_SNAPSHOTS):
            client.update(model)
        if not client.flush(durable=True):
            raise TimeoutError("the server did not publish within a minute")
    client.close()
    grown = {name: highest[name] - idle[name] for name in idle}
    print(json.dumps({"snapshot": parameter_bytes(model), **grown}), flush=True)


@contextmanager
def _highest(**processes: int) -> Iterator[dict[str, int]]:
    """The most memory that each process was seen to have meanwhile, in bytes."""
    highest = dict.fromkeys(processes, 0)
    done = threading.Event()

    def look() -> None:
        for name, pid in processes.items():
            highest[name] = max(highest[name], pss_bytes(pid))

    def watch() -> None:
        while not done.wait(_LOOK_EVERY_S):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
        look()
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
