"""A server killed at any call to the disk loses nothing that it reported as durable, and leaves nothing partial."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.crash_checks import REPORTS, check_blending, check_deleting, check_publishing

pytestmark = pytest.mark.process


def _kill_at_every_call(root: Path, scenario: str, calls_min: int) -> list[tuple[Path, list[str]]]:
    """The data folder that each killed process left, and what it had reported; the last one was not killed."""
    command = [sys.executable, "-m", "support.crashing", str(root), scenario]
    tests = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = sorted(root.iterdir())
    assert len(folders) == int(done.stdout) + 1 > calls_min, "every call was fatal once"
    return [(folder / "data", (folder / "reported").read_text().splitlines()) for folder in folders]


@pytest.mark.timeout(500)
def test_kill_at_any_disk_call_leaves_complete_generations(tmp_path: Path) -> None:
    left = _kill_at_every_call(tmp_path, "publishing", 100)
    assert left[-1][1] == REPORTS
    for data, reported in left:
        check_publishing(data, reported)


@pytest.mark.timeout(500)
def test_kill_at_any_disk_call_of_a_deletion_leaves_the_complete_run_or_nothing(tmp_path: Path) -> None:
    left = _kill_at_every_call(tmp_path, "deleting", 20)
    assert left[-1][1] == ["finished", "deleted"]
    outcomes = {(tuple(reported), check_deleting(data)) for data, reported in left if reported}
    assert outcomes == {(("finished",), True), (("finished",), False), (("finished", "deleted"), False)}


@pytest.mark.timeout(500)
def test_kill_at_any_disk_call_of_a_blend_leaves_the_complete_version_or_nothing(tmp_path: Path) -> None:
    left = _kill_at_every_call(tmp_path, "blending", 20)
    assert [line.split()[0] for line in left[-1][1]] == ["finished", "blend-0.5", "blend-0.25", "deleting", "deleted"]
    for data, reported in left:
        check_blending(data, [tuple(line.split()) for line in reported])
