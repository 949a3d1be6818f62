"""The weights of a training by step, as the test saw them, to compare with what the server made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ema_reader import Reader
from support.oracle import bound, ledger_steps, replay
from support.processes import ServerProcess


class Recorder:
    """Keeps a copy of the weights of `model` after each step that is recorded.

    Attributes:
        weights: the copies by step; those of a step that is recorded again replace the earlier ones.
    """

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def record(self, step: int, model: nn.Module) -> None:
        self.weights[step] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def check(self, server: ServerProcess, run: str, steps: list[int], decay: float = 0.9) -> None:
        """The averages `raw` and `ema:{decay}` of a run hold exactly `steps`, and equal a float64 replay of these."""
        last = self.weights[steps[-1]]
        with Reader(server.http) as reader:
            raw, ema = (reader.load(f"{run}/{average}@step-{steps[-1]}") for average in ("raw", f"ema-{decay}"))
        assert raw.keys() == ema.keys() == last.keys()
        for name, value in last.items():
            assert torch.equal(raw[name], value.float() if value.is_floating_point() else value), name
        ledger = ledger_of(server, run, f"ema-{decay}")
        assert ledger_steps(ledger) == steps
        expected = replay(ledger, decay, self.weights.__getitem__)
        largest = max(_largest(weights) for weights in self.weights.values())
        for name, value in expected.items():
            difference = (ema[name].double() - value.double()).abs().max().item()
            assert difference <= bound(ledger, decay, largest), name


def ledger_of(server: ServerProcess, run: str, average: str) -> dict[str, Any]:
    """The ledger of the newest version, as its `version.json` has it."""
    with Reader(server.http) as reader:
        version = reader.version(run, average)
    about = server.get(f"/v1/runs/{run}/averages/{average}/versions/{version.id}/files/version.json")
    ledger: dict[str, Any] = about["ledger"]
    return ledger


def _largest(weights: Mapping[str, Tensor]) -> float:
    return max(value.abs().max().item() for value in weights.values() if value.is_floating_point())
