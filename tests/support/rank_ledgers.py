"""Checks averages that `stamped_ranks.py` made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from support.oracle import bound, largest_difference, ledger_steps, replay
from support.stamped_ranks import DECAY, NAN_EVERY, RUN, value_at, weights_at

_LARGEST = 5.0  # of the weights


def check_generations(data: Path) -> list[int]:
    """Check all averages on disk; returns the steps of the newest ledger."""
    steps: list[int] = []
    folders = sorted((data / "runs" / RUN / "generations").glob("[0-9]*"))
    assert folders
    for folder in folders:
        for average in ("raw", f"ema-{DECAY}"):
            version = folder / "averages" / average
            about = json.loads((version / "version.json").read_text())
            steps = _check_version(about, load_file(version / "model.safetensors"))
    return steps


def _check_version(about: dict[str, Any], tensors: dict[str, Tensor]) -> list[int]:
    """Check one average: all ranks' elements are of the same steps and the same start, and equal a float64 replay."""
    ledger = about["ledger"]
    steps = ledger_steps(ledger)
    assert not [step for step in steps if step % NAN_EVERY == 0]
    for name, tensor in tensors.items():
        assert len(tensor.unique()) == 1, (about["step"], name, tensor)
    decay = 0.0 if about["spec"] == "raw" else DECAY
    expected = replay(ledger, decay, weights_at)
    start = tensors.pop("start")
    if not decay:
        incarnation = start[0].item() - value_at(about["step"])
        assert incarnation == int(incarnation) >= 0
    del expected["start"]
    assert largest_difference(tensors, expected) <= bound(ledger, decay, _LARGEST)
    return steps
