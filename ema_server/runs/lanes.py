"""Thread-safe store of how the trainer of each run sends its snapshots."""

from __future__ import annotations

import threading


class LaneStore:
    """The lane of each run that a trainer streams: `shm` or `zmq`. Ingest writes, HTTP reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[str, str] = {}

    def get(self, run: str) -> str | None:
        """The lane of a run; None if no trainer streams it."""
        with self._lock:
            return self._lanes.get(run)

    def joined(self, run: str, lane: str) -> None:
        """A trainer streams the run by this lane from now on."""
        with self._lock:
            self._lanes[run] = lane

    def left(self, run: str) -> None:
        """No trainer streams the run, or the run was deleted."""
        with self._lock:
            self._lanes.pop(run, None)
