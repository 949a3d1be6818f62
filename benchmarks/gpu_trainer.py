"""The trainer of the GPU benchmark, in a process of its own: one JSON line per round.

Takes the server's address, the model's width and the batch. Prints, for each way of keeping an average, seconds per
step, seconds per step in our code, the share of snapshots that was skipped, and the highest memory of the GPU in bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.models import step, trained
from benchmarks.rival import ModelEma
from trainer_client import EmaClient

ARMS = ("none", "attach", "attach, overlap=False", "V3 on the CPU", "V3 on the GPU")

_TOKENS = 197
_WARM_STEPS = 3
_FLUSH_S = 60.0


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    for name in ("width", "batch", "rounds", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    model, optimizer, patches = trained(args.width, args.batch, _TOKENS, "cuda")
    for turn in range(args.rounds + 1):
        steps = args.steps if turn else 1
        found = {arm: _measured(args.endpoint, arm, (model, optimizer, patches), steps) for arm in ARMS}
        if turn:
            print(json.dumps(found), flush=True)


def _measured(endpoint: str, arm: str, training: tuple[nn.Module, Optimizer, Tensor], steps: int) -> dict[str, float]:
    """Measure one arm, after the GPU memory of the previous one is released."""
    model, optimizer, patches = training
    with _averaging(endpoint, arm, model, optimizer) as (after, stats):
        for _ in range(_WARM_STEPS):
            step(model, optimizer, patches)
            after()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = stats(), time.perf_counter()
        for _ in range(steps):
            step(model, optimizer, patches)
            after()
        torch.cuda.synchronize()
        seconds, now = time.perf_counter() - started, stats()
    return {
        "step_s": seconds / steps,
        "blocked_s": (now["blocked_s_total"] - before["blocked_s_total"]) / steps,
        "skipped": (sum(now["skipped"].values()) - sum(before["skipped"].values())) / steps,
        "memory": float(torch.cuda.max_memory_allocated()),
    }


@contextmanager
def _averaging(
    endpoint: str, arm: str, model: nn.Module, optimizer: Optimizer
) -> Iterator[tuple[Callable[[], None], Callable[[], dict[str, Any]]]]:
    """The function that is called after each step, and the counts of our client (zeros without one)."""
    nothing: dict[str, Any] = {"blocked_s_total": 0.0, "skipped": {}}
    if arm.startswith("V3"):
        rival = ModelEma(model, device=torch.device("cpu") if arm == "V3 on the CPU" else None)
        yield lambda: rival.update(model), lambda: nothing
    elif arm == "none":
        yield lambda: None, lambda: nothing
    else:
        overlap = arm == "attach"
        run = f"bench-gpu-{'overlap' if overlap else 'awaited'}"
        client = EmaClient(endpoint, run=run, averages=["ema:0.9999"], resume="never", overlap=overlap)
        try:
            client.attach(model, optimizer)
            yield lambda: None, client.stats
            client.flush(_FLUSH_S)  # no transfer of this arm overlaps the next
        finally:
            client.close()


if __name__ == "__main__":
    main()
