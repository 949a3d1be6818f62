from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ema_cli.demo.child import Child, ProcessFailed

_READY = "import json, sys, time; print(json.dumps({'ready': 1}), flush=True); "


def _child(tmp_path: Path, program: str) -> Child:
    return Child("trainer", ["-c", program], tmp_path / "trainer.log")


def test_lines_arrive_as_values_up_to_the_last(tmp_path: Path) -> None:
    with _child(tmp_path, "for n in range(1000): print(n)") as child:
        child.first_line(30.0)
        seen = 1
        while child.running:
            seen += sum(1 for _ in child.lines())
        seen += sum(1 for _ in child.lines())

    assert seen == 1000


def test_early_exit_reports_code_and_last_lines(tmp_path: Path) -> None:
    with (
        _child(tmp_path, "import sys; sys.exit('no room on the disk')") as child,
        pytest.raises(ProcessFailed, match=r"(?s)the trainer ended with exit code 1.*no room on the disk"),
    ):
        child.first_line(30.0)


def test_killed_process_reports_its_signal(tmp_path: Path) -> None:
    with _child(tmp_path, _READY + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)") as child:
        child.first_line(30.0)
        while child.running:
            pass

        with pytest.raises(ProcessFailed, match="killed by SIGKILL"):
            child.check()


def test_silent_process_times_out(tmp_path: Path) -> None:
    with (
        _child(tmp_path, "import time; time.sleep(60)") as child,
        pytest.raises(ProcessFailed, match=r"printed nothing for 0\.2 s"),
    ):
        child.first_line(0.2)

    assert not child.running


def test_leaving_the_context_ends_the_process(tmp_path: Path) -> None:
    with _child(tmp_path, _READY + "time.sleep(60)") as child:
        child.first_line(30.0)

    assert not child.running


def test_stopping_a_process_that_exits_with_0_is_no_failure(tmp_path: Path) -> None:
    program = f"import signal, sys; signal.signal({int(signal.SIGTERM)}, lambda *_: sys.exit(0)); "
    with _child(tmp_path, program + _READY + "time.sleep(60)") as child:
        child.first_line(30.0)
        child.stop()

        assert not child.running


def test_callers_settings_do_not_reach_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMA_TOKEN", "of another server")

    with _child(tmp_path, "import json, os; print(json.dumps({'token': os.environ.get('EMA_TOKEN')}))") as child:
        assert child.first_line(30.0) == {"token": None}
