"""The examples are what users copy: they run as they are, but for the server's address and the number of steps."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
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
        options = ("--recalibrate-bn", "evaluate_digits:training_batches", "--task", "recalibrated")
        recalibrated = ema("evaluate", *arguments, *options, cwd=_EXAMPLES)
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


def test_ddp_example_streams_from_rank_0_only(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        steps = ("STEPS = 2000", f"STEPS = {_STEPS}")
        script = tmp_path / "ddp_digits.py"
        script.write_text(_script("ddp_digits.py", ("tcp://127.0.0.1:5555", server.zmq), steps, _EVERY_STEP))
        launched = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
        with Process(*launched) as trainer:
            assert trainer.wait(180.0) == 0, list(trainer.errors)
        run = server.get("/v1/runs/ddp-digits")

    assert sorted(line for line in trainer.lines if line.startswith("rank")) == [
        f"rank 0: {_STEPS} steps, the client is finished",
        f"rank 1: {_STEPS} steps, the client is inert",
    ]
    assert (run["state"], run["step"], run["applied"]) == ("finished", _STEPS, _STEPS)


def test_fsdp_example_streams_from_all_ranks(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        steps = ("STEPS = 2000", f"STEPS = {_STEPS}")
        script = tmp_path / "train_fsdp2.py"
        script.write_text(_script("train_fsdp2.py", ("tcp://127.0.0.1:5555", server.zmq), steps, _EVERY_STEP))
        launched = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
        with Process(*launched) as trainer:
            assert trainer.wait(180.0) == 0, list(trainer.errors)
        run = server.get("/v1/runs/fsdp-digits")

    assert sorted(line for line in trainer.lines if line.startswith("rank")) == [
        f"rank {rank}: {_STEPS} steps, the client is finished" for rank in range(2)
    ]
    assert (run["state"], run["step"], run["applied"]) == ("finished", _STEPS, _STEPS)


def test_accumulated_batches_and_steps_that_the_scaler_leaves_out_are_no_steps(tmp_path: Path) -> None:
    batches = ("BATCHES = 8000", f"BATCHES = {4 * _STEPS}")
    too_large = (("SCALE = 2.0**16", "SCALE = 2.0**127"), ("loss / BATCHES_PER_STEP", "loss * 1000"))
    with ServerProcess(tmp_path / "data") as server:
        script = _script("amp_digits.py", ("tcp://127.0.0.1:5555", server.zmq), batches, *too_large, _EVERY_STEP)
        with Process("-c", script) as trainer:
            assert trainer.wait() == 0, list(trainer.errors)
        run = server.get("/v1/runs/amp-digits")

    assert run["state"] == "finished"
    assert _STEPS // 2 < run["step"] < _STEPS
    assert trainer.lines[-1] == f"{4 * _STEPS} batches, {run['step']} steps"
    assert run["applied"] == run["step"]


def test_notebook_cells_can_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notebook = json.loads((_EXAMPLES / "digits.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    with ServerProcess(tmp_path / "data") as server:
        here = {"tcp://127.0.0.1:5555": server.zmq, "http://127.0.0.1:8080": server.http}
        here |= {"STEPS = 1000": f"STEPS = {_STEPS}", "averages=[": 'when_behind="wait", averages=['}
        for printed, value in here.items():
            assert sum(cell.count(printed) for cell in cells) == 1
            cells = [cell.replace(printed, value) for cell in cells]
        setup, client, train, compare, finish = cells
        names: dict[str, Any] = {}
        for cell in (setup, client, train, train, compare, client, train, compare, finish):
            exec(cell, names)  # noqa: S102  our own cells
        runs = {run["run"]: run for run in server.get("/v1/runs")["runs"]}

    earlier, last = (runs[name] for name in sorted(runs, key=lambda name: name == "notebook"))
    assert (earlier["step"], last["step"], last["state"]) == (2 * _STEPS, _STEPS, "finished")
    assert earlier["run"] in caplog.text
    assert all(0.05 < score <= 1 for score in names["scores"].values())


def test_evaluation_over_the_network_needs_addresses_and_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = _address_of_this_machine()
    monkeypatch.setenv("EMA_TOKEN", "0123456789abcdef")
    with ServerProcess(tmp_path / "data", zmq="tcp://0.0.0.0:0", http="0.0.0.0:0") as server:
        endpoint, url = (
            f"{scheme}://{address}:{printed.rpartition(':')[2]}"
            for scheme, printed in (("tcp", server.zmq), ("http", server.http))
        )
        monkeypatch.setenv("EMA_URL", url)
        script = _script(
            "train_digits.py", ("tcp://127.0.0.1:5555", endpoint), ("STEPS = 5000", f"STEPS = {_STEPS}"), _EVERY_STEP
        )
        with Process("-c", script) as trainer:
            assert trainer.wait() == 0, list(trainer.errors)
        evaluated = ema("evaluate", "evaluate_digits:accuracy", "--run", "digits", "--json", cwd=_EXAMPLES)
        monkeypatch.delenv("EMA_TOKEN")
        refused = ema("evaluate", "evaluate_digits:accuracy", "--run", "digits", cwd=_EXAMPLES)

    assert evaluated.returncode == 0, evaluated.stderr
    outcomes = [json.loads(line) for line in evaluated.stdout.splitlines()]
    assert {outcome["version"]["average"] for outcome in outcomes} == {"raw", "ema-0.99", "ema-0.999"}
    assert refused.returncode != 0
    assert "EMA_TOKEN" in refused.stderr


def _address_of_this_machine() -> str:
    """One that other machines would use; the loopback's where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the system chooses the interface
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def test_about_five_lines_of_the_training_script_are_ours() -> None:
    lines = (_EXAMPLES / "train_digits.py").read_text().splitlines()
    ours = [line for line in lines if "  # ema" in line]

    assert len(ours) <= 5
    assert [line for line in lines if ("ema." in line or "EmaClient" in line) and line not in ours] == []
