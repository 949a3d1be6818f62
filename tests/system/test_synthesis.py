"""Power averages made after a run, by the real service, against those that were tracked and against float64.

Nothing is trained: a random walk of 2,000 steps is streamed. In between the server is killed and started again, and the
trainer goes back by hundreds of steps, to walk on elsewhere.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_proto.averages.profiles import gamma_of
from ema_reader import Reader, Synthesized, Version
from support.command import ema
from support.oracle import EPS32, ledger_steps
from support.processes import ServerProcess
from support.waiting import eventually
from trainer_client import EmaClient, PowerEma

_STEPS = 2000
_CHECKPOINT, _BACK_AT, _KILLED_AT = 1000, 1200, 700
_WIDTHS = (0.075, 0.12, 0.15)
_EVERY = 80
_SERVE = ("--publish-every-seconds", "0", "--ring-every-steps", str(_EVERY), "--ring-size", "40")


class _Walk(nn.Module):
    """Weights that walk at random; `history` has those of each step as the run ended up, `count` the newest step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(1))
        self.history: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def to_step(self, step: int) -> _Walk:
        before = self.history.get(step - 1, torch.zeros(64))
        self.weight.copy_(before + 0.05 * torch.randn(64, generator=self._generator))
        self.get_buffer("count").fill_(step)
        self.history[step] = self.weight.detach().clone()
        return self


def _stream(ema: EmaClient, walk: _Walk, first: int, last: int) -> None:
    """Walk on; at each point of the ring's cadence the server has to keep up, so that it misses none."""
    for step in range(first, last + 1):
        ema.update(walk.to_step(step), step)
        if step % _EVERY == 0:
            assert ema.flush(60, durable=True)


def _ledger(reader: Reader, version: Version, folder: Path) -> dict[str, Any]:
    record = json.loads((reader.download(version, folder) / "version.json").read_text())
    found: dict[str, Any] = record["ledger"]
    return found


def _exactly(ledger: dict[str, Any], walk: _Walk, gamma: float) -> tuple[Tensor, float]:
    """The power average over the applied steps in float64, and the L2 norm over time of how far the weights stray."""
    steps = [ledger["origin"], *ledger_steps(ledger)]
    weights = torch.stack([walk.history[step].double() for step in steps[1:]])
    edges = (torch.tensor(steps, dtype=torch.float64) - ledger["origin"]) / (steps[-1] - ledger["origin"])
    average = (edges.pow(gamma + 1).diff()[:, None] * weights).sum(0)
    times = torch.tensor(steps, dtype=torch.float64).diff()[:, None]
    strays = ((weights - weights.mean(0)).square() * times).sum(0).sqrt().max()
    return average, float(strays)


def _bound(made: Synthesized, strays: float, largest: float) -> float:
    """How far the result may be off: by Cauchy and Schwarz, the profile's error times its norm times the weights' own.

    The norm over time of the profile `(gamma + 1) / T * (t / T) ** gamma` is `(gamma + 1) / sqrt((2 * gamma + 1) * T)`.
    Stored averages are float32: each update rounds by a few units in the last place, which later ones forget.
    """
    norm = (made.gamma + 1) / math.sqrt((2 * made.gamma + 1) * _STEPS)
    return made.estimated_error * norm * strays + 100 * EPS32 * largest * made.amplification


def _ema(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ema_cli", *arguments, "--url", server.http]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with the finished run `pair`, and its walk.

    Two of its averages are to make others of. Those that are tracked beside them, to be compared with, copy buffers:
    so they cannot be added up with the two.
    """
    data, walk = tmp_path_factory.mktemp("synthesis") / "data", _Walk()
    server = ServerProcess(data, *_SERVE)
    tracked = [PowerEma(width, name=f"tracked-{width}", buffers="copy") for width in _WIDTHS]
    averages: list[Any] = [PowerEma(0.05), PowerEma(0.10), *tracked, "raw"]
    with EmaClient(server.zmq, "pair", averages=averages, when_behind="wait") as ema:
        _stream(ema, walk, 1, _KILLED_AT)
        assert ema.flush(60, durable=True)
        with server:
            server.kill()
        server = ServerProcess(data, *_SERVE, zmq=server.zmq, http=server.http_address)
        eventually(lambda: ema.stats()["reconnects"] == 1, "the trainer is back", 60.0)
        _stream(ema, walk, _KILLED_AT + 1, _CHECKPOINT)
        ema.checkpoint(_CHECKPOINT)
        _stream(ema, walk, _CHECKPOINT + 1, _BACK_AT)
        assert ema.rewind(_CHECKPOINT) == _CHECKPOINT
        _stream(ema, walk, _CHECKPOINT + 1, _STEPS)
        assert ema.finish()
    with server:
        yield server, walk


@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", _WIDTHS)
def test_synthesized_version_equals_the_average_that_was_not_kept(
    streamed: tuple[ServerProcess, _Walk], tmp_path: Path, width: float
) -> None:
    server, walk = streamed
    with Reader(server.http) as reader:
        made = reader.derived.synthesize("pair", sigma_rel=width)
        assert (made.version.step, made.origin, made.gamma) == (_STEPS, 0, gamma_of(width))
        assert 0 < made.estimated_error < 0.005
        assert made.warning is None
        found = reader.load(made.version)

        kept = reader.version("pair", "power-0.05")
        exact, strays = _exactly(_ledger(reader, kept, tmp_path / "kept"), walk, made.gamma)
        tracked = reader.load(reader.version("pair", f"tracked-{width}"))
        bound = _bound(made, strays, float(exact.abs().max()))
        assert (found["weight"].double() - exact).abs().max() <= bound
        assert (tracked["weight"].double() - exact).abs().max() <= bound
        nearest = min(
            float((reader.load(reader.version("pair", name))["weight"].double() - exact).abs().max())
            for name in ("power-0.05", "power-0.1", "raw")
        )
        assert bound < nearest / 5, "it could not be distinguished from one that was kept"
        assert found["count"].item() == _STEPS
        assert reader.derived.synthesize("pair", sigma_rel=width) == made


@pytest.mark.timeout(300)
def test_ring_holds_no_steps_dropped_by_a_rewind(streamed: tuple[ServerProcess, _Walk]) -> None:
    server, _ = streamed
    with Reader(server.http) as reader:
        made = reader.derived.synthesize("pair", gamma=9.5)
    path = f"/v1/runs/pair/averages/{made.version.average}/versions/{made.version.id}/files/version.json"
    record = server.get(path)
    inputs = [(part["average"], part["step"]) for part in record["derived"]["inputs"]]

    assert {average for average, _ in inputs} == {"power-0.05", "power-0.1"}
    assert len(set(inputs)) == len(inputs), "no step is there twice"
    assert {step for _, step in inputs} <= {*range(_EVERY, _STEPS, _EVERY), _STEPS}
    kept = server.get("/v1/runs/pair")["ring"]
    assert kept == {"snapshots": _STEPS // _EVERY, "first_step": _EVERY, "last_step": _STEPS, "error": None}


@pytest.mark.timeout(300)
def test_stopped_ring_reports_its_error_and_the_run_continues(streamed: tuple[ServerProcess, _Walk]) -> None:
    """A file at the path of the ring folder makes every write to the ring fail."""
    server, walk = streamed
    (server.data / "runs" / "blocked").mkdir()
    (server.data / "runs" / "blocked" / "ring").touch()
    with EmaClient(server.zmq, "blocked", averages=[PowerEma(0.05), PowerEma(0.10)], when_behind="wait") as ema:
        ema.update(walk, 1)
        assert ema.finish()
    with Reader(server.http) as reader:
        eventually(lambda: reader.run("blocked").ring is not None, "a ring that says what is wrong")
        run = reader.run("blocked")
        assert (run.state, run.published_step, run.publish_error) == ("finished", 1, None)
        assert run.ring is not None
        assert (run.ring.snapshots, run.ring.error) == (0, "step 1 could not be kept: File exists")
    shown = _ema(server, "status", "blocked").stdout
    assert "blocked: no more is stored to synthesise from: step 1 could not be kept: File exists" in shown
    assert any("run blocked: its ring for later synthesis stores no more snapshots" in line for line in server.errors)


@pytest.mark.timeout(300)
def test_command_prints_the_version(streamed: tuple[ServerProcess, _Walk]) -> None:
    server, _ = streamed
    result = _ema(server, "synthesize", "pair", "--sigma-rel", "0.21", "--json")
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["version"]["average"] == "power-0.21"
    shown = _ema(server, "synthesize", "pair", "--sigma-rel", "0.21")
    assert f"pair/power-0.21 at step {_STEPS}" in shown.stdout
    assert f"estimated error {made['estimated_error']:.2%}" in shown.stdout
    assert ("warning" in shown.stderr) == (made["warning"] is not None)

    both = _ema(server, "synthesize", "pair", "--sigma-rel", "0.21", "--sigma-rel", "0.22").stdout
    assert [line.split()[0] for line in both.splitlines()] == ["pair/power-0.21", "pair/power-0.22"]

    refused = _ema(server, "synthesize", "pair", "--sigma-rel", "0.25", "--step", str(_EVERY))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "The stored snapshots of the run do not suffice: run 'pair': " in refused.stderr
    assert "ask for a width closer to theirs" in refused.stderr
    assert _ema(server, "synthesize", "pair").returncode == 2


_EVALUATION = """
def evaluate(state):
    power = float(state["weight"].square().mean())
    return {"power": power, "loss": abs(power - 1), "auc": None, "samples": 64}

def fails(state):
    raise ValueError("no data")
"""


def _evaluated(server: ServerProcess, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(_EVALUATION)
    return ema("synthesize", "pair", *arguments, "--url", server.http, cwd=folder)


@pytest.mark.timeout(300)
def test_command_evaluates_several_widths_and_names_the_best(
    streamed: tuple[ServerProcess, _Walk], tmp_path: Path
) -> None:
    server, _ = streamed
    widths = ("--sigma-rel", "0.065,0.085", "--sigma-rel", "0.11")
    done = _evaluated(server, tmp_path, *widths, "--evaluate", "mine:evaluate")
    with Reader(server.http) as reader:
        made = {name: reader.version("pair", name) for name in ("power-0.065", "power-0.085", "power-0.11")}
        power = {name: float(reader.load(made[name])["weight"].square().mean()) for name in made}
        rows = {row.average: row for row in reader.metrics("pair") if row.average in made}

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "average", "version", "estimated_error", "auc", "loss", "power"]
    best = max(power, key=lambda name: power[name])
    for line, (name, version) in zip(lines[1:4], made.items(), strict=True):
        step, average, shown, error, auc, _, value = line.split()
        assert (step, average, shown, auc) == (str(_STEPS), name, version.id[:12], "missing")
        assert error.endswith("%")
        assert value == f"{power[name]:.6g}" + "*" * (name == best)
    assert f"best power: ema download pair/{best}@{made[best].id[:12]}" in lines
    assert "best auc" not in done.stdout
    assert {row.metrics["power"] for row in rows.values()} == set(power.values())
    assert all(row.missing["auc"].startswith("NoneType") for row in rows.values())

    again = _evaluated(server, tmp_path, *widths, "--evaluate", "mine:fails", "--by", "power", "--min", "--json")
    assert again.returncode == 0, "versions with metrics for the task are not evaluated again"
    shown_again = json.loads(again.stdout)
    assert [made["version"]["average"] for made in shown_again["synthesized"]] == list(made)
    assert [score["average"] for score in shown_again["metrics"]] == sorted(power, key=lambda name: power[name])
    assert shown_again["best"]["power"]["version"] == made[min(power, key=lambda name: power[name])].id


@pytest.mark.timeout(300)
def test_command_reports_widths_that_fail_and_keeps_the_others(
    streamed: tuple[ServerProcess, _Walk], tmp_path: Path
) -> None:
    server, _ = streamed
    partly = _evaluated(server, tmp_path, "--sigma-rel", "0.09,0.0001")
    failed = _evaluated(server, tmp_path, "--sigma-rel", "0.09", "--evaluate", "mine:fails", "--task", "broken")
    as_json = _evaluated(server, tmp_path, "--sigma-rel", "0.09,0.11", "--json")

    assert partly.returncode == 1
    assert partly.stdout.startswith("pair/power-0.09 at step")
    assert partly.stderr.startswith(
        "ema: warning: sigma_rel 0.0001 was not made: The stored snapshots of the run do not"
    )
    assert failed.returncode == 1
    assert f"power-0.09 at step {_STEPS}: task broken failed: ValueError: no data" in failed.stdout
    assert [json.loads(line)["sigma_rel"] for line in as_json.stdout.splitlines()] == [0.09, 0.11]
