"""Evaluation functions for workers that run as processes. `EVALUATIONS` in the environment is a folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

GATED_S = 60.0


def bias(state: dict[str, Tensor]) -> dict[str, float]:
    """A value of the weights, and a count of samples."""
    return {"bias": float(state["first.bias"][0]), "samples": 7}


def gated(state: dict[str, Tensor]) -> dict[str, float]:
    """Write this process's id, and continue once the test has created a file `go`."""
    folder = Path(os.environ["EVALUATIONS"])
    (folder / f"{os.getpid()}.pid").touch()
    deadline = time.monotonic() + GATED_S
    while not (folder / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bias(state)


def stubborn(state: dict[str, Tensor]) -> dict[str, float]:
    """Code that ignores every request to stop."""
    while True:
        try:
            gated(state)
        except SystemExit:
            continue


def fails(state: dict[str, Tensor]) -> dict[str, float]:
    """A mistake in a user's function."""
    raise ValueError("the data set has no labels")


def dies(state: dict[str, Tensor]) -> dict[str, float]:
    """A process that is killed, as for lack of memory."""
    os.kill(os.getpid(), 9)
    return {}
