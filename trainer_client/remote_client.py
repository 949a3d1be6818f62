"""The session behind `RemoteModelEma` and `RemoteEMAModel`.

The average is chosen when it joins; it can be replaced and published.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from typing import Any

from torch import nn

from ema_proto.averages.rules import AverageSpec
from trainer_client.client import EmaClient
from trainer_client.errors import AverageError
from trainer_client.lifecycle import State
from trainer_client.session import CLOSE_TIMEOUT_S, Session, connect
from trainer_client.settings import Settings

log = logging.getLogger("ema")


class RemoteClient:
    """Streams updates by hand to a run with one average. It connects at once, and joins with `begin`.

    Args:
        settings: arguments of `EmaClient`, by their names; the others have its defaults.

    Raises:
        SettingsError: an argument cannot be used.
        ConnectError: the server cannot be reached.
    """

    def __init__(self, **settings: Any) -> None:
        defaults = {name: each.default for name, each in inspect.signature(EmaClient).parameters.items()}
        self._settings = Settings.of(os.environ, defaults | settings)
        self._session = Session(self._settings, connect)

    @property
    def run(self) -> str:
        """The run's name."""
        return self._settings.run

    def begin(self, model: nn.Module, average: AverageSpec, steps: int) -> None:
        """Join the run with this average, `steps` optimizer steps after its beginning.

        Raises:
            PlanError: the model holds something that cannot be streamed.
            JoinError: the server refuses the run.
            ClientClosed: the client was closed or finished.
        """
        if self._session.life.usable() and not self._session.joined:
            self._settings = dataclasses.replace(self._settings, averages=(average,))
            self._session.join(model, self._settings, steps)

    def update(self, model: nn.Module, step: int) -> None:
        """Send a snapshot of `model` as of `step`; the weights have been copied when this returns.

        Raises:
            ClientClosed: the client was closed or finished.
        """
        if self._session.life.usable():
            self._session.update(model, step)

    def replace(self, model: nn.Module, step: int) -> bool:
        """Have the averages become the weights of `model`, as of `step`; False when they could not be sent.

        Raises:
            ClientClosed: the client was closed or finished.
        """
        return self._session.life.usable() and self._session.replace(model, step)

    def publish(self, timeout_s: float) -> int:
        """Publish everything that was sent, and keep it like a checkpoint; return the step of that generation.

        Raises:
            AverageError: that is not confirmed in time, or nothing has been applied.
            ClientClosed: the client was closed.
        """
        session, steps = self._session, self._session.steps or 0
        if session.life.state is State.FINISHED:
            return steps  # it was published when it finished
        if not session.life.usable() or not session.joined:
            raise AverageError(f"run {self.run} is streamed by another client: this one has no average")
        answer = session.publish(timeout_s)
        if answer.error is not None or answer.step is None:
            stats = session.worker.stats()
            raise AverageError(
                f"run {self.run}: the average at step {steps} was not published within {timeout_s:g} s "
                f"({answer.error or 'nothing was applied'}; the connection is {stats.state}, applied are steps up to "
                f"{stats.last_committed_step}): see the server's log"
            )
        if answer.step != steps:
            text = "ema: the average of run %s is that of step %d: later steps were not applied (now at step %d)"
            log.warning(text, self.run, answer.step, steps)
        return answer.step

    def rewind(self, step: int, timeout_s: float) -> None:
        """Take the run back to where it was after `step` steps.

        Raises:
            RewindError: it cannot be taken back, or the server did not answer in time.
            ClientClosed: the client was closed or finished.
        """
        if self._session.life.usable():
            self._session.rewind(step, timeout_s)

    def finish(self, timeout_s: float) -> bool:
        """See `EmaClient.finish`."""
        return self._session.finish(timeout_s)

    def close(self) -> None:
        """Leave the run open on the server and stop; calling it again changes nothing."""
        self._session.close(CLOSE_TIMEOUT_S)
