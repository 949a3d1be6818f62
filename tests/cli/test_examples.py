"""The examples are what users copy: they run as they are, but for the server's address and the number of steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.command import ema
from support.processes import Process, ServerProcess

_EXAMPLES = Path(__file__).parents[2] / "examples"
_STEPS = 60
_TASKS = ("default", "recalibrated")
_EVERY_STEP = ("averages=[", 'when_behind="wait", averages=[')  # even where the machine is busy
_VERSIONS = "/v1/runs/resumed-digits/averages"


def _script(name: str, *changes: tuple[str, str]) -> str:
    """An example with other values."""
    script = (_EXAMPLES / name).read_text()
    for printed, here in changes:
        assert script.count(printed) == 1
        script = script.replace(printed, here)
    return script


def _training(server: ServerProcess) -> str:
    """The training script for this server, and short."""
    return _script(
        "train_digits.py", ("tcp://127.0.0.1:5555", server.zmq), ("STEPS = 5000", f"STEPS = {_STEPS}"), _EVERY_STEP
    )


def test_the_examples_train_evaluate_and_report(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        with Process("-c", _training(server)) as trainer:
            assert trainer.wait() == 0, list(trainer.errors)
        arguments = ("evaluate_digits:accuracy", "--run", "digits", "--url", server.http, "--json")
        evaluated = ema("evaluate", *arguments, cwd=_EXAMPLES)
        anew = ("--recalibrate-bn", "evaluate_digits:training_batches", "--task", "recalibrated")
        recalibrated = ema("evaluate", *arguments, *anew, cwd=_EXAMPLES)
        reported = server.get("/v1/runs/digits/metrics")["metrics"]

    outcomes = [json.loads(line) for line in evaluated.stdout.splitlines()]
    assert evaluated.returncode == 0, evaluated.stderr
    assert {outcome["version"]["average"] for outcome in outcomes} == {"raw", "ema-0.99", "ema-0.999"}
    found = {task: {r["average"]: r["metrics"] for r in reported if r["task"] == task} for task in _TASKS}
    assert found["default"] == {outcome["version"]["average"]: outcome["metrics"] for outcome in outcomes}
    assert all(row["step"] == _STEPS and 0.05 < row["metrics"]["accuracy"] <= 1 for row in reported)
    assert recalibrated.returncode == 0, recalibrated.stderr
    assert "recomputed 3 of 3 layers over 10 batches; called with ([90, 1, 8, 8])" in recalibrated.stderr
    assert all(found["recalibrated"][name] != found["default"][name] for name in found["default"])


def test_a_training_that_is_killed_goes_on_from_its_checkpoint_with_the_averages_of_that_step(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        file = ('Path("digits.pt")', f"Path({str(tmp_path / 'digits.pt')!r})")
        here = (("tcp://127.0.0.1:5555", server.zmq), file, _EVERY_STEP)
        endless = _script(
            "resume_digits.py", *here, ("STEPS = 5000", "STEPS = 1 << 40"), ("_EVERY = 500", "_EVERY = 40")
        )
        with Process("-c", endless) as trainer:
            trainer.wait_line(lambda line: line.startswith("saved step 80:"))
            trainer.kill()
        saved = torch.load(tmp_path / "digits.pt")["step"]
        short = _script("resume_digits.py", *here, ("STEPS = 5000", f"STEPS = {saved + 20}"))
        with Process("-c", short) as trainer:
            trainer.wait_line(lambda line: line == f"continuing after step {saved}")
            assert trainer.wait() == 0, list(trainer.errors)
        run = server.get("/v1/runs/resumed-digits")
        steps = [version["step"] for version in server.get(f"{_VERSIONS}/ema-0.99/versions")["versions"]]

    assert (run["state"], run["step"]) == ("finished", saved + 20)
    assert steps[0] == saved + 20
    assert any(saved - 40 < step <= saved for step in steps)


def test_about_five_lines_of_the_training_script_are_ours() -> None:
    lines = (_EXAMPLES / "train_digits.py").read_text().splitlines()
    ours = [line for line in lines if "  # ema" in line]

    assert len(ours) <= 5
    assert [line for line in lines if ("ema." in line or "EmaClient" in line) and line not in ours] == []
