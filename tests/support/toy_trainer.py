"""Trains the toy in a process: `python toy_trainer.py ENDPOINT RUN STEPS CHECKPOINT [PAUSE_S [KEY=VALUE ...]]`.

It resumes from its own checkpoint, prints the steps that the server acknowledged as published, and ends with
one JSON line of its client's statistics.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from support.toy import Toy
from trainer_client import EmaClient

CHECKPOINT_EVERY = 25


def main(endpoint: str, run: str, steps: int, checkpoint: Path, pause_s: float, options: dict[str, Any]) -> None:
    """Train to `steps`, checkpointing; finish the run."""
    model = Toy()
    averages = options.pop("averages", "ema:0.9,ema:0.99,raw").split(",")
    client = EmaClient(endpoint, run, averages, connect_timeout_s=60.0, **options)
    if checkpoint.exists():
        client.load_state_dict(json.loads(checkpoint.read_text()))
    first, published = client.steps + 1, None
    for step in range(first, steps + 1):
        client.update(model.at(step), step)
        if step % CHECKPOINT_EVERY == 0 and client.checkpoint(step, timeout_s=10.0):
            temporary = checkpoint.with_suffix(".tmp")
            temporary.write_text(json.dumps(client.state_dict()))
            temporary.replace(checkpoint)
        newest = client.stats()["last_published_step"]
        if newest != published:
            published = newest
            print(f"published {published} at {step}", flush=True)
        time.sleep(pause_s)
    finished = client.finish()
    print(json.dumps({"finished": finished, **client.stats()}), flush=True)


if __name__ == "__main__":
    pause = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
    given: dict[str, Any] = dict(item.split("=", 1) for item in sys.argv[6:])
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), pause, given)
