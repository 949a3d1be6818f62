"""Blends by the real service and the command: two runs, a sweep of weights, and other workers at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ema_reader import Reader, RequestRefused
from support.command import ema
from support.processes import SUPPORT, Process, ServerProcess
from support.waiting import eventually
from trainer_client import EmaClient

_STEPS = 20
_EVALUATION = """
def evaluate(state):
    with open("evaluated", "a") as lines:
        print(float(state["first.bias"][0]), file=lines)
    return {"loss": float(state["first.bias"].square().mean())}

def fails(state):
    raise ValueError("no data")
"""


class _Line(nn.Module):
    """A bias that grows with the step, from `start` on."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.first = nn.Linear(1, 64)
        nn.init.constant_(self.first.bias, start)
        self.register_buffer("count", torch.tensor(0))

    def to_step(self, step: int) -> _Line:
        with torch.no_grad():
            self.first.bias.add_(0.5)
        self.get_buffer("count").fill_(step)
        return self


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the finished runs `a` and `b`, of the averages `ema` and `raw`."""
    with ServerProcess(tmp_path_factory.mktemp("blend") / "data", "--publish-every-seconds", "0") as server:
        for run, start in (("a", 0.0), ("b", -3.0)):
            model = _Line(start)
            with EmaClient(server.zmq, run, averages=["ema:0.9,name=ema", "raw"], when_behind="wait") as client:
                for step in range(1, _STEPS + 1):
                    client.update(model.to_step(step), step)
                assert client.finish()
        yield server


def _blend(server: ServerProcess, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(_EVALUATION)
    return ema("blend", *arguments, "--url", server.http, cwd=folder)


def _sweep(gammas: str, *others: str) -> tuple[str, ...]:
    return ("a/ema", "--with", "raw", "--gamma", gammas, "--evaluate", "mine:evaluate", *others)


@pytest.mark.timeout(300)
def test_blend_of_two_runs_has_the_float64_sum(server: ServerProcess) -> None:
    with Reader(server.http) as reader:
        versions = [reader.version("a", "ema"), reader.version("b", "raw")]
        made = reader.derived.blend(versions, [0.3, 0.7])
        tensors = [reader.load(version) for version in versions]
        found = reader.load(made.version)
        assert reader.derived.blend(versions, [0.3, 0.7]) == made
        with pytest.raises(RequestRefused, match=r"the weights 0.3, 0.6 add up to 0.9, not to 1"):
            reader.derived.blend(versions, [0.3, 0.6])

    exact = 0.3 * tensors[0]["first.bias"].double() + 0.7 * tensors[1]["first.bias"].double()
    assert torch.equal(found["first.bias"], exact.float())
    assert found["count"].item() == _STEPS
    assert (made.version.run, made.version.average) == ("a", "ema_0.3-b.raw_0.7")
    assert [(each.run, each.average, each.weight) for each in made.inputs] == [("a", "ema", 0.3), ("b", "raw", 0.7)]


@pytest.mark.timeout(300)
def test_command_makes_a_blend_and_shows_its_ledger(server: ServerProcess, tmp_path: Path) -> None:
    done = _blend(server, tmp_path, f"a/ema@step-{_STEPS}", "--with", "raw", "--weights", "0.75,0.25", "--name", "mix")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"a/mix at step {_STEPS} (")
    assert f"0.75 x a/ema at step {_STEPS}, 0.25 x a/raw at step {_STEPS}" in done.stdout

    ledger = json.loads(ema("ledger", "a/mix", "--json", "--url", server.http).stdout)
    assert ledger["steps"][0] == [_STEPS, pytest.approx(0.25 + 0.75 * 0.1)]
    listed = ema("versions", "a", "--url", server.http).stdout
    assert "mix" in listed
    refused = _blend(server, tmp_path, "a/ema", "--with", "raw", "--weights", "0.75,0.2")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "add up to 0.95, not to 1" in refused.stderr
    missing = _blend(server, tmp_path, "a/ema", "--with", "b/swa", "--gamma", "0.5")
    assert missing.returncode == 3
    assert "run 'b' has no average 'swa'" in missing.stderr


@pytest.mark.timeout(300)
def test_sweep_evaluates_each_blend_once_and_names_the_best(server: ServerProcess, tmp_path: Path) -> None:
    done = _blend(server, tmp_path, *_sweep(".1,.2,.3"))
    again = _blend(server, tmp_path, *_sweep(".1,.2,.3", "--json"))

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "average", "version", "weights", "loss"]
    cells = [line.split() for line in lines[1:4]]
    assert [(row[1], row[3]) for row in cells] == [
        ("ema_0.9-raw_0.1", "0.9,0.1"),
        ("ema_0.8-raw_0.2", "0.8,0.2"),
        ("ema_0.7-raw_0.3", "0.7,0.3"),
    ]
    assert [row[4].endswith("*") for row in cells] == [True, False, False], "the smallest weights have the least loss"
    assert f"best loss: ema download a/ema_0.9-raw_0.1@{cells[0][2]}" in lines
    assert len((tmp_path / "evaluated").read_text().split()) == 3, "versions with metrics are not evaluated again"
    shown = json.loads(again.stdout)
    assert [each["version"]["average"] for each in shown["blended"]] == [row[1] for row in cells]
    assert shown["best"]["loss"]["average"] == "ema_0.9-raw_0.1"


@pytest.mark.timeout(300)
def test_sweep_beside_a_worker_evaluates_no_version_twice(server: ServerProcess, tmp_path: Path) -> None:
    """The worker holds one version when the command begins; the command waits for its result."""
    folder = tmp_path / "evaluations"
    folder.mkdir()
    (tmp_path / "mine.py").write_text(_EVALUATION)
    sweep = ("a/ema", "--with", "raw", "--gamma", ".55,.6", "--evaluate", "mine:evaluate", "--task", "shared")
    with Reader(server.http) as reader:
        versions = [reader.version("a", "ema"), reader.version("a", "raw")]
        first = reader.derived.blend(versions, [0.45, 0.55]).version
        options = ("--averages", first.average, "--url", server.http, "--task", "shared", "--worker", "other")
        command = ("-m", "ema_cli", "evaluate", "support.evaluations:gated", "--run", "a", *options)
        with Process(*command, env={"EVALUATIONS": str(folder), "PYTHONPATH": str(SUPPORT.parent)}):
            eventually(lambda: list(folder.glob("*.pid")), "the other worker has a version", 60.0)
            blend = [sys.executable, "-m", "ema_cli", "blend", *sweep, "--url", server.http]
            with subprocess.Popen(
                blend, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            ) as running:
                assert running.stderr is not None
                errors = []
                for line in running.stderr:
                    errors.append(line)
                    if "another worker; waiting" in line:
                        (folder / "go").touch()
        rows = [row for row in reader.metrics("a") if row.task == "shared"]

    assert f"{first} is being evaluated by another worker" in "".join(errors)
    assert running.returncode == 0, errors
    assert sorted((row.average, row.worker == "other") for row in rows) == [
        ("ema_0.4-raw_0.6", False),
        (first.average, True),
    ]
    assert len((tmp_path / "evaluated").read_text().split()) == 1
