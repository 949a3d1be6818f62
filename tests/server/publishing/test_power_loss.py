"""A power loss at any moment loses nothing that the server reported as durable, and leaves nothing unreadable."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support import crashing
from support.crash_checks import check_blending, check_deleting, check_publishing
from support.power_loss import MODES, Mode, Recorder

pytestmark = pytest.mark.process


def _recorded(scenario: Callable[[Path, Callable[[str], None]], None], root: Path) -> Recorder:
    recorder = Recorder(root)
    root.mkdir()
    with recorder.recording():
        scenario(root / "new" / "data", recorder.report)
    return recorder


def _after_each_moment(
    recorder: Recorder, tmp_path: Path, check: Callable[[Path, list[str]], None], modes: Sequence[Mode] = MODES
) -> None:
    for number, moment in enumerate(recorder.moments):
        for mode in modes:
            left = tmp_path / "left"
            moment.leave(left, mode, seed=number)
            try:
                check(left / "new" / "data", list(moment.reported))
            except BaseException as error:
                error.add_note(f"after moment {number} of {len(recorder.moments)}, {mode}: {moment.reported}")
                raise
            shutil.rmtree(left)


@pytest.mark.timeout(500)
def test_power_loss_keeps_what_was_published(tmp_path: Path) -> None:
    recorder = _recorded(crashing.publishing, tmp_path / "recorded")

    assert len(recorder.moments) > 40
    _after_each_moment(recorder, tmp_path, check_publishing)


@pytest.mark.timeout(500)
def test_power_loss_keeps_or_deletes_a_run_completely(tmp_path: Path) -> None:
    def check(data: Path, reported: list[str]) -> None:
        if reported:
            assert not check_deleting(data) or reported == ["finished"]

    _after_each_moment(_recorded(crashing.deleting, tmp_path / "recorded"), tmp_path, check)


@pytest.mark.timeout(500)
def test_power_loss_keeps_what_was_blended(tmp_path: Path) -> None:
    def check(data: Path, reported: list[str]) -> None:
        if reported:
            check_blending(data, [tuple(line.split()) for line in reported])

    _after_each_moment(_recorded(crashing.blending, tmp_path / "recorded"), tmp_path, check)
