"""Which cuts of rings are still to be made: beyond which step the snapshots of a run are of a history left behind.

Comes in: cuts that are wanted. Goes out: the lowest step of a run's. They are in memory, and on the disk as soon as one
could not be made, so that a restart does not forget it. What is dropped then, and how, is not known here.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ema_server.storage.datadir import DataDir
from ema_server.storage.disk import replace_durably, sync_folders

_FILE = "ring.cut"  # not in the ring's own folder, which may be what refuses

logger = logging.getLogger("ema")


class Cuts:
    """The cuts that are still to be made (publisher only, `rename` and `read` apart).

    Args:
        data_dir: where runs lie.
    """

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir
        self._steps: dict[str, int] = {}

    def step(self, run: str) -> int | None:
        """Beyond which step the run's snapshots go; None where all may stay."""
        return self._steps.get(run)

    def want(self, run: str, step: int) -> None:
        """Everything beyond `step` is to go, and beyond what was wanted before."""
        self._steps[run] = min(step, self._steps.get(run, step))

    def write(self, run: str) -> None:
        """Note on the disk that the cut could not be made.

        Raises:
            OSError: the disk refuses.
        """
        if run in self._steps:
            replace_durably(self._path(run), b"%d\n" % self._steps[run])

    def read(self, run: str) -> None:
        """Do what an earlier process could not do.

        Raises:
            OSError: the disk fails.
        """
        try:
            self.want(run, int(self._path(run).read_bytes()))
        except FileNotFoundError:
            return
        except ValueError:
            self.want(run, -1)  # which history the snapshots are of is not known any more
            logger.error("run %s: %s is not what was written: its ring begins anew", run, self._path(run))

    def done(self, run: str) -> None:
        """The cut has been made, durably.

        Raises:
            OSError: the disk refuses; the cut is made once more then.
        """
        path = self._path(run)
        if path.exists():
            path.unlink()
            sync_folders([path.parent])
        self._steps.pop(run, None)

    def rename(self, run: str, new_run: str) -> None:
        """The run and its folder have another name."""
        step = self._steps.pop(run, None)
        if step is not None:
            self._steps[new_run] = step

    def _path(self, run: str) -> Path:
        return self._data_dir.run_folder(run) / _FILE
