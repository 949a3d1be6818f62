from __future__ import annotations

from pathlib import Path

import pytest

from ema_proto.averages.specs import parse_averages
from ema_server.checkpoints.average import Averaged, average
from ema_server.checkpoints.folders import find
from ema_server.checkpoints.weights import weigh
from support.checkpoints import Run


class _Counted:
    def __init__(self) -> None:
        self.total = self.read = 0

    def start(self, nbytes: int) -> None:
        self.total = nbytes

    def advance(self, nbytes: int) -> None:
        self.read += nbytes


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Averages the checkpoints at `paths` into `tmp_path / "out"`."""

    def averaged(
        *paths: Path,
        rules: str = "window:5",
        output: Path = tmp_path / "out",
        keep_dtype: bool = False,
        force: bool = False,
    ) -> list[Averaged]:
        checkpoints = find(paths)
        weighings = [weigh(rule, [one.step for one in checkpoints]) for rule in parse_averages(rules)]
        progress = _Counted()
        made = average(checkpoints, weighings, output, progress, keep_dtype=keep_dtype, force=force)
        assert progress.read == progress.total > 0
        return made

    return averaged
