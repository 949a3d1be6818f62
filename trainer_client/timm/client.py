"""The client behind `RemoteModelEma`: it can also replace the averages, and says which step was published."""

from __future__ import annotations

import dataclasses
import logging

from torch import nn

from ema_proto.averages.rules import AverageSpec
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
        if self._life.usable() and self._stream is None:
            self._settings = dataclasses.replace(self._settings, averages=(average,))
            self._join(model, steps)

    def replace(self, model: nn.Module, step: int) -> bool:
        """Have the averages become the weights of `model`, as of `step`; False when they could not be sent."""
        return self._life.usable() and self._replace(model, step)

    def publish(self, timeout_s: float) -> int:
        """Publish everything that was sent, and keep it like a checkpoint; return the step of that generation.

        Raises:
            AverageError: that is not confirmed in time, or nothing has been applied.
            ClientClosed: the client was closed.
        """
        if self._life.state is State.FINISHED:
            return self.steps  # it was published when it finished
        if not self._life.usable() or self._stream is None:
            raise AverageError(f"run {self.run} is streamed by another client: this one has no average")
        answer = self._publish(self._stream, timeout_s)
        if answer.error is not None or answer.step is None:
            stats = self._worker.stats()
            raise AverageError(
                f"run {self.run}: the average at step {self.steps} was not published within {timeout_s:g} s "
                f"({answer.error or 'nothing was applied'}; the connection is {stats.state}, applied are steps up to "
                f"{stats.last_committed_step}): see the server's log"
            )
        if answer.step != self.steps:
            log.warning(
                "ema: the average of run %s is that of step %d: later steps were not applied (now at step %d)",
                self.run,
                answer.step,
                self.steps,
            )
        return answer.step
