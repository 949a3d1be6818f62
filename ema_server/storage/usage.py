"""How much disk space each run takes. A measurement reads the metadata of every file of a run, so it is kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ema_server.storage.datadir import DataDir

_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own block is


class DiskUsage:
    """The disk space of every run, as last measured. Safe from any thread.

    The publisher and the thread for derived versions change the files of a run, and have it measured afterwards.
    """

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir
        self._measuring = threading.Lock()  # so that the newest measurement is the one that stays
        self._nbytes: dict[str, int] = {}

    def get(self, run: str) -> int | None:
        """Bytes that the files of a run take on the disk; None if it has not been measured."""
        return self._nbytes.get(run)

    def measure(self, run: str) -> None:
        """Measure a run. Never on a thread that others wait for: it reads the disk."""
        with self._measuring:
            folder = self._data_dir.run_folder(run)
            if folder.is_dir():
                self._nbytes[run] = allocated_bytes(folder)
            else:
                self._nbytes.pop(run, None)


def allocated_bytes(folder: Path) -> int:
    """Bytes that the disk has allocated for a folder, as `du` counts them: a file with several names counts once.

    Files that are deleted meanwhile may be left out.
    """
    total, counted = 0, set[tuple[int, int]]()
    for parent, _, names in os.walk(folder):
        for path in (Path(parent), *(Path(parent, name) for name in names)):
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if (found.st_dev, found.st_ino) not in counted:
                counted.add((found.st_dev, found.st_ino))
                total += found.st_blocks * _BLOCK_BYTES
    return total
