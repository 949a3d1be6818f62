"""Power averages made after the run: ours beside ema-pytorch's `PostHocEMA`, and both beside the exact average."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor

from ema_reader import Reader
from support.libraries import library
from support.oracle import EPS32
from support.parity_model import STEPS, ProfileModel
from support.processes import ServerProcess
from trainer_client import EmaClient

_KEPT = (0.05, 0.1)
_MADE = 0.075


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data", "--ring-size", "64") as process:
        yield process


def _both(server: ServerProcess, every: int, folder: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The reported errors of our average, its weights, and those of ema-pytorch's, by the interval of snapshots."""
    model, run = ProfileModel(), f"every-{every}"
    theirs = library("ema_pytorch").PostHocEMA(
        model,
        sigma_rels=_KEPT,
        update_every=1,
        checkpoint_every_num_steps=every,
        checkpoint_dtype=torch.float64,
        checkpoint_folder=str(folder),
    )
    rules = [f"power:sigma_rel={width}" for width in _KEPT]
    with EmaClient(server.zmq, run, rules, when_behind="wait") as client:
        for step in range(1, STEPS + 1):
            client.update(model.at(step), step)
            theirs.update()
            if step % every == 0:
                assert client.checkpoint(step)
    made = httpx2.post(f"{server.http}/v1/runs/{run}/synthesize", json={"sigma_rel": _MADE}, timeout=60.0).json()
    with Reader(server.http) as reader:
        ours = reader.load(reader.version(run, made["version"]["average"]))["profile"].double()
    return made, ours, theirs.synthesize_ema_model(sigma_rel=_MADE).ema_model.profile.detach()


def _wanted(gamma: float) -> Tensor:
    """The exact profile: each step has the integral of the power function over it."""
    edges = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS) ** (gamma + 1)
    return torch.cat([torch.zeros(1), edges.diff(), torch.zeros(1)])


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_synthesized_power_average_is_the_requested_one(server: ServerProcess, tmp_path: Path) -> None:
    """And within the error that the answer names; ema-pytorch, which counts one step more, comes near to it too."""
    made, ours, theirs = _both(server, 50, tmp_path)

    gamma = library("ema_pytorch.post_hoc_ema").sigma_rel_to_gamma(_MADE)
    assert made["gamma"] == pytest.approx(gamma, rel=1e-9)
    assert _distance(ours, _wanted(gamma)) <= made["estimated_error"] * 1.1 + 100 * EPS32
    assert made["estimated_error"] < 0.01
    assert _distance(theirs, ours) < 0.02


def test_few_snapshots_shrink_the_weights_of_ema_pytorch_and_not_ours(server: ServerProcess, tmp_path: Path) -> None:
    """Its shares do not add up to 1: all weights are too small, which batch norm hides and the rest does not."""
    _, ours, theirs = _both(server, 250, tmp_path)

    assert float(ours.sum()) == pytest.approx(1.0, abs=100 * EPS32)
    assert abs(float(theirs.sum()) - 1.0) > 0.01
