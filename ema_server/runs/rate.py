"""Steps per second over the newest snapshots. Pure: times come in as arguments."""

from __future__ import annotations

from collections import deque

_SAMPLES = 64


class Rate:
    """The mean rate over the newest 64 snapshots."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def note(self, now: float, step: int) -> None:
        """A snapshot of `step` was applied at `now` seconds."""
        self._samples.append((now, step))

    def reset(self) -> None:
        """Begin anew."""
        self._samples.clear()

    def steps_per_second(self) -> float | None:
        """The rate, None before there are two samples."""
        if len(self._samples) < 2:
            return None
        (first_at, first_step), (last_at, last_step) = self._samples[0], self._samples[-1]
        return (last_step - first_step) / (last_at - first_at) if last_at > first_at else None
