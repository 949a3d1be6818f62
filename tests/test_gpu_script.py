"""`scripts/gpu.py`, without a GPU: what is missing is said, time is bounded, and results are summarised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.scripts import script
from support.waiting import eventually

pytestmark = pytest.mark.process

gpu = script("gpu")
_ROOT = Path(__file__).parents[1]
_ABOUT = {"card": "Card 1", "driver": "1.2", "versions": "Python 3, torch 2", "date": "today", "commit": "abc"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_machine_without_a_gpu_gets_an_error_and_no_results(tmp_path: Path) -> None:
    program = str(_ROOT / "scripts" / "gpu.py")
    command = [sys.executable, program, "--results", str(tmp_path / "results"), "--wheels", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert ran.returncode == 2
    assert "finds no CUDA device" in ran.stderr
    assert not (tmp_path / "results").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "MODULES", ("json", "no_such_module", "nor_this"))

    with pytest.raises(SystemExit) as ended:
        gpu.look(dict(os.environ))

    assert ended.value.code == 2
    assert "lacks no_such_module, nor_this: install" in capsys.readouterr().err


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_parts_are_bounded_and_what_they_leave_is_summarised(tmp_path: Path) -> None:
    cases = "<testcase classname='a' name='x'/><testcase classname='a' name='y'><failure/></testcase>"
    cases += "<testcase classname='a' name='z'><skipped/></testcase>"
    xml = f"<testsuites><testsuite>{cases}</testsuite></testsuites>"
    table = "- machine: M\n### device: t\n| a | b |\n|---|---|\n| 1 | 2 |\nOn one Card 1."
    leave_json = f"import pathlib; pathlib.Path({str(tmp_path / 'device.json')!r}).write_text('{{\"benchmarks\": 1}}')"
    parts = [
        gpu.Part(
            "tests", _python(f"open({str(tmp_path / 'tests.xml')!r}, 'w').write({xml!r}); raise SystemExit(1)"), 1
        ),
        gpu.Part("device", _python(f"print({table!r}); {leave_json}"), 1),
        gpu.Part("gpu_step", _python("import time; print('- began', flush=True); time.sleep(300)"), 0.5),
    ]

    gpu.run(parts, dict(os.environ), tmp_path, 5.0)
    gpu.write(parts, _ABOUT, tmp_path)

    assert [part.outcome.split()[0] for part in parts] == ["exit", "ended", "stopped"]
    assert [part.failed for part in parts] == [True, False, True]
    assert sum(part.seconds for part in parts) < 100
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["card"] == "Card 1"
    tests = summary["parts"]["tests"]
    assert (tests["passed"], tests["failed"], tests["skipped"], tests["failures"]) == (1, 1, 1, ["a::y"])
    assert summary["parts"]["device"]["benchmarks"] == 1
    text = (tmp_path / "summary.md").read_text()
    assert "- driver: 1.2" in text
    assert "| 1 | 2 |\nOn one Card 1." in text
    assert "- began" in text
    assert "## gpu_step: stopped after" in text


def test_processes_that_a_part_leaves_are_ended(tmp_path: Path) -> None:
    child = "import time; time.sleep(300)"
    program = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    part = gpu.Part("tests", _python(program), 1)

    gpu.run([part], dict(os.environ), tmp_path, 60.0)

    pid = int((tmp_path / "tests.txt").read_text())
    assert part.outcome == "ended"
    eventually(lambda: not _is_running(pid), "the process is killed")


def test_every_benchmark_of_a_gpu_is_a_part(tmp_path: Path) -> None:
    from benchmarks.__main__ import GPU_BENCHMARKS

    assert {part.name for part in gpu.parts(tmp_path, quick=True)} == {"tests", *GPU_BENCHMARKS}
