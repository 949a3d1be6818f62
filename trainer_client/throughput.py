"""Measures a run's first snapshots, and says once whether every step can be kept."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Final

log = logging.getLogger("ema")

_WARM_UP: Final = 3  # first intervals that are not counted: they hold compilation and caches that fill
_MEASURED: Final = 8
_APPLIED_MIN: Final = 4


class Throughput:
    """The times of a run's first snapshots; all in seconds, the training thread's.

    Args:
        nbytes: of one snapshot.
        every: of the settings.
        lane: how snapshots reach the server.
    """

    def __init__(self, nbytes: int, every: int, lane: str) -> None:
        self._nbytes = nbytes
        self._every = every
        self._lane = lane
        self._previous: tuple[float, float] | None = None
        self._intervals: list[float] = []
        self._copies: list[float] = []

    def due(self, now: float, blocked_s: float) -> None:
        """A snapshot is due `now`; the loop has spent `blocked_s` in all in our code before."""
        if self._previous is not None:
            before, blocked_before = self._previous
            self._intervals.append(now - before - (blocked_s - blocked_before))
        self._previous = (now, blocked_s)

    def copied(self, seconds: float) -> None:
        """A snapshot took the training thread so long."""
        self._copies.append(seconds)

    def log(self, applying_s: Sequence[float]) -> bool:
        """Log the line once enough is measured; whether it is logged.

        Args:
            applying_s: of the newest snapshots, how long sending and averaging one took.
        """
        if len(self._intervals) < _WARM_UP + _MEASURED or len(applying_s) < _APPLIED_MIN:
            return False
        copy_s = statistics.median(self._copies)
        apply_s = statistics.median(applying_s)
        interval_s = statistics.median(self._intervals[_WARM_UP:]) + copy_s
        text = "ema: a snapshot has %s; the training thread spends %s on one (%.3g GB/s), sending it over %s and "
        text += "averaging it take %s, and one is due every %s: %s"
        values = (_size(self._nbytes), _time(copy_s), self._nbytes / copy_s / 1e9, self._lane, _time(apply_s))
        log.info(text, *values, _time(interval_s), self._verdict(apply_s / interval_s))
        return True

    def _verdict(self, load: float) -> str:
        if load <= 1:
            return "every step can be kept" if self._every == 1 else f"every={self._every} can be kept"
        return f"not all can be kept; every={math.ceil(self._every * load)} can"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.3g} GB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
