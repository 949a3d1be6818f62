"""Notices that the weights are written again and again while no step is counted."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from trainer_client.model.sources import version_of

log = logging.getLogger("ema")

_WATCHED: Final = 4  # tensors, spread over the model
_PERIOD_S: Final = 1.0
_PERIODS: Final = 10  # fewer may be weights that are swapped for an evaluation, or loaded


class Watch:
    """Looks at the versions of some parameters now and then; those do not show writes through `.data`.

    It runs in the connection's thread, where it must not call an operation of torch or keep a tensor alive.

    Attributes:
        steps: counted so far; the training thread sets it.
    """

    def __init__(self, parameters: Sequence[Tensor], steps: int) -> None:
        stride = max(1, len(parameters) // _WATCHED)
        self.steps = steps
        self._tensors = [weakref.ref(tensor) for tensor in parameters[::stride]]
        self._seen: tuple[int, list[int]] = (steps, self._versions())
        self._writes = 0  # periods with a write since the last step
        self._looked_at = 0.0

    def look(self, now: float) -> None:
        """Look, at most once in a period; `now` is monotonic."""
        if now - self._looked_at < _PERIOD_S or self._writes >= _PERIODS:
            return
        self._looked_at = now
        seen = (self.steps, self._versions())
        if seen[0] != self._seen[0]:
            self._writes = 0
        elif seen[1] != self._seen[1]:
            self._writes += 1
        self._seen = seen
        if self._writes >= _PERIODS:
            log.error(
                "ema: the weights are being written, but no step has been counted since step %d, and no snapshot was "
                "sent: pass the optimizer that steps to attach(), or call update(model, step) after each step",
                self.steps,
            )

    def _versions(self) -> list[int]:
        return [version_of(tensor) for ref in self._tensors if (tensor := ref()) is not None]
