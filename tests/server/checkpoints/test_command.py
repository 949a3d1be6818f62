"""`ema average` as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ema_cli.app import build, run
from support.checkpoints import load, save, save_run, weights


class _Command:
    """Runs `ema` in this process, in a folder of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._monkeypatch.setattr(sys, "argv", ["ema", *arguments])
        code = run(build())
        return code, *self._capsys.readouterr()


@pytest.fixture
def ema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> _Command:
    monkeypatch.chdir(tmp_path)
    return _Command(monkeypatch, capsys)


def test_prints_the_share_of_each_checkpoint(tmp_path: Path, ema: _Command) -> None:
    save_run(tmp_path / "run", (500, 1000, 1500))

    code, out, err = ema("average", "run", "--rule", "window:2", "--rule", "ema:half_life=500", "-o", "avg")

    assert code == 0, err
    assert err == (
        "ema: warning: ema-half_life-500 begins with the checkpoint of step 500: 25% of it is still the weights that "
        "it began with, so it is too long for the steps since then: use a shorter average, or warmup=half_life\n"
    )
    first, second = out.rstrip().split("\n\n")
    assert first.splitlines()[1:] == [
        "  step 1000   50.00%  run/checkpoint-1000",
        "  step 1500   50.00%  run/checkpoint-1500",
    ]
    assert first.startswith("avg/window-2: window:2 of 2 checkpoints, ")
    assert second.splitlines()[1:] == [
        "  step  500   25.00%  run/checkpoint-500",
        "  step 1000   25.00%  run/checkpoint-1000",
        "  step 1500   50.00%  run/checkpoint-1500",
    ]
    assert (tmp_path / "avg" / "window-2" / "model.safetensors").exists()


def test_json_is_the_content_of_version_json_with_the_folder(tmp_path: Path, ema: _Command) -> None:
    save_run(tmp_path / "run", (500, 1000))

    _, out, _ = ema("average", "run/checkpoint-1000", "run/checkpoint-500", "--rule", "swa", "-o", "avg", "--json")

    shown = json.loads(out)
    version = json.loads((tmp_path / "avg" / "version.json").read_text())
    assert shown == {"averages": [{"path": "avg", **version}], "warnings": []}


def test_average_of_one_checkpoint_is_a_warning(tmp_path: Path, ema: _Command) -> None:
    save_run(tmp_path / "run", (500, 1000))

    code, _, err = ema("average", "run", "--rule", "wsd:start=2000,steps=500", "--rule", "raw", "-o", "avg")

    assert code == 0
    assert err == ("ema: warning: wsd-start-2000-steps-500 consists of one checkpoint, that of step 1000\n")


def test_step_0_without_a_share_is_a_warning(tmp_path: Path, ema: _Command) -> None:
    save_run(tmp_path / "run", (0, 1, 2))

    code, _, err = ema("average", "run", "--rule", "power:gamma=0", "-o", "avg")

    assert code == 0
    assert "power-gamma-0 has nothing of the checkpoint of step 0" in err


def test_given_weights_belong_to_the_checkpoints_in_the_order_given(tmp_path: Path, ema: _Command) -> None:
    save(tmp_path / "b", {"w": torch.tensor([1.0])})
    save(tmp_path / "a", {"w": torch.tensor([5.0])})

    code, _, err = ema("average", "b", "a", "--weights", "3,1", "-o", "avg", "--dtype", "source")

    assert code == 0, err
    assert load(tmp_path / "avg")["w"].tolist() == [2.0]
    assert json.loads((tmp_path / "avg" / "version.json").read_text())["spec"] == "weights:3,1"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run"], 2, "give --rule"),
        (["run", "--rule", "swa", "--weights", "1,1"], 2, "give --rule"),
        (["run", "--rule", "mean"], 2, "unknown average 'mean'"),
        (["run", "--rule", "swa", "--rule", "swa"], 2, "two averages are named 'swa'"),
        (["run", "--rule", "ema:half_life_epochs=2"], 2, "give the half-life in steps"),
        (["run", "--weights", "1,x"], 2, "--weights '1,x' is not a list of numbers"),
        (["run", "--weights", "1"], 2, "--weights has 1 numbers for 2 checkpoints"),
        (["run", "--rule", "swa", "--steps", "-1,5"], 2, "is not in 0 … 2^53"),
        (["run", "--rule", "swa", "--steps", "9007199254740992,9007199254740993"], 2, "is not in 0 … 2^53"),
        (["run/checkpoint-1", "nowhere", "--rule", "swa"], 1, "nowhere does not exist"),
        (["other", "--rule", "swa"], 1, "they are of different models"),
    ],
)
def test_failure_is_one_line_and_an_exit_code(
    tmp_path: Path, ema: _Command, arguments: list[str], code: int, says: str
) -> None:
    save_run(tmp_path / "run", (1, 2))
    save(save_run(tmp_path / "other", (1,)) / "checkpoint-2", {"w": torch.zeros(1)})

    found, _, err = ema("average", *arguments, "-o", "avg")

    assert found == code
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "avg").exists()


def test_disk_that_cannot_be_written_is_one_line(tmp_path: Path, ema: _Command) -> None:
    save_run(tmp_path / "run", (1, 2))
    (tmp_path / "file").touch()

    code, _, err = ema("average", "run", "--rule", "swa", "-o", "file/avg")

    assert code == 1
    assert "file" in err
    assert len(err.splitlines()) == 1


@pytest.mark.process
def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    save(tmp_path / "1", weights(1))
    save(tmp_path / "2", weights(2))
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ema_cli", "average", "1", "2", "--rule", "swa", "-o", "avg"],
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=tmp_path,
            timeout=60,
            check=False,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        shown = os.read(ours, 1 << 16).decode(errors="replace")
    finally:
        os.close(theirs)
        os.close(ours)

    assert done.returncode == 0, shown
    assert "100%" in shown or "kB" in shown
    assert "avg: swa of 2 checkpoints" in done.stdout.decode()
