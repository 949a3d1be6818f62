"""One client at work: its settings, its connection, the run that it joined, and the order in which these end.

Comes in: what the client was asked for, arguments checked. Goes out: snapshots through a worker, answers, counts. What
a script may write, and whether it may at this moment, is decided by the client in front of it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from functools import partial
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from ema_proto.averages.exponential import Ema
from ema_proto.averages.step_units import half_life_steps, needed_of
from trainer_client.connection.transport import Transport, seconds_left
from trainer_client.connection.worker import Worker
from trainer_client.counters import Counters
from trainer_client.errors import JoinError, RewindError, SettingsError
from trainer_client.hooks import Attachment
from trainer_client.lifecycle import Lifecycle, State, when_forgotten
from trainer_client.settings import Settings
from trainer_client.staging.device import DeviceOf, device_of
from trainer_client.stream import Stream, steps_before

log = logging.getLogger("ema")

CLOSE_TIMEOUT_S = 5.0


class Session:
    """What an `EmaClient` stands in front of.

    Args:
        settings: the client's.
        worker: connected, has joined nothing.
        device_of: the device behind a torch device, None where copies cannot go on while training does.
    """

    def __init__(self, settings: Settings, worker: Worker, device_of: DeviceOf = device_of) -> None:
        self.settings = settings
        self.life = Lifecycle()
        self._steps_known = settings.step
        self._counters = Counters()
        self._transport = Transport(worker, self._counters, device_of)
        self._stream: Stream | None = None
        self._attachment = Attachment()
        # The hooks of an optimizer keep a session alive: a script may drop the client and go on training.
        self._cancel_forgotten = when_forgotten(self, self.life, partial(self._transport.close, CLOSE_TIMEOUT_S))

    @classmethod
    def open(cls, settings: Settings, device_of: DeviceOf = device_of) -> Self:
        """Connect, and be greeted.

        Raises:
            ConnectError: the server cannot be reached, speaks another version, or refuses the token.
        """
        worker = Worker(settings.endpoint, token=settings.token)
        try:
            worker.greet(settings.connect_timeout_s)
        except BaseException:
            worker.close(0.0)
            raise
        return cls(settings, worker, device_of)

    @property
    def worker(self) -> Worker:
        """The connection."""
        return self._transport.worker

    @property
    def joined(self) -> bool:
        """Whether a run is joined."""
        return self._stream is not None

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, those before this client included."""
        if self._stream is not None:
            return self._stream.steps
        return 0 if self._steps_known is None else self._steps_known

    def attach(self, model: nn.Module, optimizers: tuple[Optimizer, ...]) -> Attachment:
        """Join unless that was done, and send a snapshot after every step of the first optimizer."""
        if self._attachment.attached:
            raise SettingsError("the client is attached already: call remove() on the handle that attach() returned")
        stream = self._begin(model) if self._stream is None else self._stream
        overlap = stream.can_overlap(model)  # a model that is moved to a device later is copied when the hook returns
        self._attachment = Attachment(
            optimizers,
            partial(self._after_step, model, overlap),
            self._before_step if overlap else None,
            when_removed=self.before_weight_write,
        )
        return self._attachment

    def update(self, model: nn.Module, step: int | None) -> None:
        """Join unless that was done, and send a snapshot as of `step`, by default the one after the last."""
        stream = self._stream
        if stream is None:
            stream = self.join(model, steps_before(step, self._steps_known))
            if self._lacks_start():
                log.warning("ema: averages with init=start begin with the first update: no set(model) came before it")
        with self._counters:
            stream.advance(model, stream.steps + 1 if step is None else step)

    def set(self, model: nn.Module) -> bool:
        """Join unless that was done, and have the averages become the weights of `model`, as of the last step."""
        stream = self.join(model, self.steps) if self._stream is None else self._stream
        return self.replace(model, stream.steps)

    def replace(self, model: nn.Module, step: int) -> bool:
        """Have the averages become the weights of `model`, as of `step`; False when they could not be sent."""
        if self._stream is None:
            return False
        with self._counters:
            return self._stream.replace(model, step)

    def join(self, model: nn.Module, steps: int) -> Stream:
        """Join the run of `model` after `steps` steps; what fails here closes the session, which asks only once."""
        try:
            self._stream = Stream.join(self._transport, model, self.settings, self._counters, steps)
        except JoinError:
            self.close(CLOSE_TIMEOUT_S)
            raise
        self._tell_lengths()
        return self._stream

    def before_weight_write(self) -> None:
        """Something other than an optimizer is about to write the weights: a copy under way must end before that."""
        if self._stream is not None and not self.life.forked():
            self._stream.hold_back_writes()

    def _begin(self, model: nn.Module) -> Stream:
        """Join, and send the weights of before the first step where an average begins with them."""
        stream = self.join(model, self.steps)
        if self._lacks_start():
            self.replace(model, stream.steps)
        return stream

    def _tell_lengths(self) -> None:
        for rule in self.settings.averages:
            if isinstance(rule, Ema) and needed_of(rule) is not None:
                steps = half_life_steps(rule, self.settings.step_units)
                text = "ema: average %s has a half-life of %g steps, a decay of %.10g at each"
                log.info(text, rule.name, steps, 0.5 ** (1 / steps))

    def _tell_end(self) -> None:
        due, last = self.steps - self.steps % self.settings.every, self.worker.stats().last_offered_step
        if last is not None and last < due:
            text = "ema: run %s ends with step %d: those up to %d were not sent; when_behind='wait' sends every step"
            log.warning(text, self.settings.run, last, due)

    def _lacks_start(self) -> bool:
        starts = any(isinstance(rule, Ema) and rule.init == "start" for rule in self.settings.averages)
        return starts and self.worker.continuation == "new"

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        """Wait until all that was sent is applied, or published."""
        return self._stream is None or self._transport.flush(timeout_s, durable=durable)

    def checkpoint(self, step: int, timeout_s: float) -> bool:
        """Publish a generation at `step`, to be kept; False with a warning when the run is not there."""
        if self._stream is None or step < self.steps:
            log.warning("ema: no checkpoint at step %d: the run is at step %d", step, self.steps)
            return False
        deadline = time.monotonic() + timeout_s
        self._stream.catch_up(timeout_s)
        return self._transport.checkpoint(seconds_left(deadline))

    def rewind(self, step: int, timeout_s: float) -> int | None:
        """Take the run back, and count steps from there.

        Raises:
            RewindError: nothing is joined, or the server did not do it.
        """
        if self._stream is None:
            raise RewindError("no run is joined yet: pass step= or call load_state_dict() before attach() or update()")
        reached = self._transport.rewind(step, timeout_s)
        self._stream.steps = step
        return reached

    def finish(self, timeout_s: float) -> bool:
        """Have the run finished, and close; whether the server confirmed it."""
        deadline, finished = time.monotonic() + timeout_s, False
        if self._stream is not None:
            self._stream.catch_up(timeout_s)
            finished = self._transport.finish(seconds_left(deadline))
            if finished:
                self._tell_end()
            else:
                text = "ema: run %s is not finished on the server; what it has applied is kept there"
                log.warning(text, self.settings.run)
        self.close(CLOSE_TIMEOUT_S)
        self.life.state = State.FINISHED if finished else State.CLOSED
        return finished

    def close(self, timeout_s: float) -> None:
        """Stop, and let go of the memory of host and device; the run stays open on the server."""
        self._attachment.remove()
        self._attachment = Attachment()  # the other one refers to this session
        self._transport.close(timeout_s)
        self._steps_known, self._stream = self.steps, None
        self._cancel_forgotten()
        self.life.state = State.CLOSED

    def load(self, run: str, step: int, timeout_s: float) -> None:
        """Go on at `step` of `run`: before joining these are set, afterwards the run is rewound.

        Raises:
            SettingsError: another run is joined already.
        """
        if self.settings.run_generated and run != self.settings.run:
            if self._stream is not None:
                joined = self.settings.run
                raise SettingsError(f"run {joined!r} is joined and the state is of {run!r}: load it before attach()")
            self.settings = dataclasses.replace(self.settings, run=run, run_generated=False)
        if self._stream is None:
            self._steps_known = step
        elif step != self.steps:
            self.rewind(step, timeout_s)

    def stats(self) -> dict[str, Any]:
        """Everything that is counted, as plain values."""
        worker = {} if self.life.forked() else dataclasses.asdict(self.worker.stats())
        own = {"run": self.settings.run, "client": self.life.state.value, "steps": self.steps}
        return own | self._counters.to_json() | worker

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._stream is not None and not self.life.forked():
            self._stream.hold_back_writes(optimizer)

    def _after_step(self, model: nn.Module, overlap: bool) -> None:
        if self.life.forked() or self._stream is None:
            return
        with self._counters:
            self._stream.advance(model, self._stream.steps + 1, overlap=overlap)
