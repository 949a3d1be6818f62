"""A trainer with a worker process that outlives it: `python trainer_with_worker.py ENDPOINT`. Prints the worker id."""

from __future__ import annotations

import os
import sys
import time

from torch import nn

from trainer_client import EmaClient


def main(endpoint: str) -> None:
    """Stream until killed."""
    model = nn.Linear(64, 64)
    client = EmaClient(endpoint, "r", ["raw"], lane="shm")
    client.update(model)
    worker = os.fork()
    if worker == 0:
        time.sleep(300)
        os._exit(0)
    print(f"worker {worker}", flush=True)
    while True:
        client.update(model)
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
