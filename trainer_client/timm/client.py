"""A client that can also replace the averages, for `RemoteModelEma`, which begins with weights of its own.

Comes in: the first step, then replacements and updates. Goes out: snapshots, and the step of what was published. Which
weights, and when, is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import logging

from torch import nn

from ema_proto.averages.specs import AverageSpec
from trainer_client.client import EmaClient
from trainer_client.errors import AverageError
from trainer_client.lifecycle import State

log = logging.getLogger("ema")


class RemoteClient(EmaClient):
    """See `EmaClient`; `begin` comes before anything is sent."""

    def begin(self, model: nn.Module, average: AverageSpec, steps: int) -> None:
        """Join the run with this average, `steps` optimizer steps after its beginning.

        Raises:
            PlanError: the model holds something that cannot be streamed.
            JoinError: the server refuses the run.
            ClientClosed: the client was closed or finished.
        """
        session = self._session
        if session.life.usable() and not session.joined:
            session.settings = dataclasses.replace(session.settings, averages=(average,))
            session.join(model, steps)

    def replace(self, model: nn.Module, step: int) -> bool:
        """Have the averages become the weights of `model`, as of `step`; False when they could not be sent."""
        return self._session.life.usable() and self._session.replace(model, step)

    def publish(self, timeout_s: float) -> int:
        """Have everything that was sent published, and kept with the newest checkpoints; the step where that stands.

        Raises:
            AverageError: that is not confirmed in time, or nothing has been applied.
        """
        if self._session.life.state is State.FINISHED:
            return self.steps  # it was published when it finished
        confirmed = self.checkpoint(self.steps, timeout_s)
        stats = self._session.worker.stats()
        if not confirmed or stats.last_published_step is None:
            raise AverageError(
                f"run {self.run}: the average at step {self.steps} was not published within {timeout_s:g} s "
                f"(the connection is {stats.state}, applied are steps up to {stats.last_committed_step}): "
                "see the server's log"
            )
        if stats.last_published_step != self.steps:
            log.warning(
                "ema: the average of run %s is that of step %d: what came after it was not applied (now at step %d)",
                self.run,
                stats.last_published_step,
                self.steps,
            )
        return stats.last_published_step
