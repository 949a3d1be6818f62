"""`Session`: a connection to the server and the run that is joined over it, as the training thread uses them.

After joining, nothing here raises into the training loop except for a programmer's error.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from ema_proto.averages.rules import begins_before_first_step
from ema_proto.sender.events import Answered
from ema_proto.wire.messages import Resume
from trainer_client.connection.worker import Worker, seconds_left
from trainer_client.counters import Counters
from trainer_client.errors import ConnectError, JoinError, PlanError
from trainer_client.lifecycle import Lifecycle, State, when_forgotten
from trainer_client.messages import log_checkpoint, log_finished, log_joined
from trainer_client.pulling.pull import Pulls
from trainer_client.settings import OnChange, Settings
from trainer_client.steps.hooks import Attachment, Listener
from trainer_client.steps.optimizers import Stepper
from trainer_client.stream import Stream, plan_of

log = logging.getLogger("ema")

CLOSE_TIMEOUT_S: Final = 5.0
_FINISH_TIMEOUT_S: Final = 60.0

_streaming: weakref.WeakSet[Session] = weakref.WeakSet()  # sessions of this process that have joined a run


def connect(settings: Settings) -> Worker:
    """Connect as `Worker.connect` does."""
    return Worker.connect(settings.endpoint, settings.token, settings.connect_timeout_s, lane=settings.lane)


class Session:
    """Connects; then joins one run, sends its snapshots, and ends. It joins only once.

    With `on_change="restart"`, a changed model is streamed to a new run of the same name over a new connection.

    Args:
        settings: where to connect to.
        connect: makes a connection.
        pulls: are called after each step, and closed at the end.

    Attributes:
        life: whether the session may be used.
        worker: the connection.
        attachment: the optimizers that are followed.

    Raises:
        ConnectError: `connect` does.
    """

    def __init__(self, settings: Settings, connect: Callable[[Settings], Worker], pulls: Pulls | None = None) -> None:
        self.life = Lifecycle()
        self.attachment = Attachment()
        self._settings = settings
        self._connect = connect
        self._pulls = Pulls() if pulls is None else pulls
        self._stream: Stream | None = None
        self._steps: int | None = None  # when it ended
        self._use(connect(settings))
        if settings.run_generated:
            # A warning, so that it is seen where logging was not set up: readers need the name.
            log.warning("ema: the run is named %s (no name was given)", settings.run)

    @property
    def set_aside(self) -> str | None:
        """The name under which the earlier run is kept, if the joined one took its name over."""
        return None if self._stream is None else self._stream.joined.set_aside

    @property
    def joined(self) -> bool:
        """Whether a run is joined, and not ended."""
        return self._stream is not None

    @property
    def steps(self) -> int | None:
        """Optimizer steps taken so far, or until the session ended; None before a run is joined."""
        return self._steps if self._stream is None else self._stream.steps

    @property
    def lacks_start(self) -> bool:
        """Whether averages of this new run are to begin with weights that were not sent yet (`init=start`, `bema`)."""
        starts = any(map(begins_before_first_step, self._settings.averages))
        return starts and self._stream is not None and self._stream.joined.continuation == "new"

    def join(self, model: nn.Module, settings: Settings, steps: int) -> None:
        """Join the run of `model` after `steps` steps; a refusal ends the session.

        Args:
            model: what is streamed.
            settings: of the run, at the endpoint that the session is connected to.
            steps: optimizer steps already taken.

        Raises:
            PlanError: the model holds something that cannot be streamed, or is not the one of the run.
            JoinError: the server refuses the run.
            SettingsError: a CUDA graph is being captured.
        """
        for other in tuple(_streaming):
            other._hand_over(settings)
        self._settings = settings
        # A script that runs again from its start, and has not asked to resume, begins a new run.
        begins = settings.resume == "auto" and settings.step is None and steps == 0
        resume: Resume = "never" if begins else settings.resume
        try:
            stream = Stream.join(self.worker, model, settings, steps, resume)
        except JoinError:
            self._end(CLOSE_TIMEOUT_S, State.CLOSED)
            raise
        self._stream = stream
        _streaming.add(self)
        if stream.sends_nothing:
            log.info("ema: other ranks send all that this rank holds of run %s: it counts steps", settings.run)
            self.worker.close(CLOSE_TIMEOUT_S)
            return
        if stream.rank == 0:
            log_joined(settings.run, stream.joined, steps, stream.last_due)

    def attach(self, model: nn.Module, steppers: Sequence[Stepper]) -> Attachment:
        """Send a snapshot after every real step of these optimizers."""
        stream = self._stream
        overlap = stream is not None and stream.can_overlap(model)  # a model moved to a device later is copied at once
        if stream is not None:
            stream.stopped = None
        self.attachment = Attachment(
            model,
            steppers,
            Listener(
                count=self.count,
                take=partial(self._take, model, overlap),
                before_write=self._hold_back_writes if overlap else lambda optimizer: None,
                when_removed=self._hold_back_writes,
            ),
        )
        return self.attachment

    def count(self, steps: int) -> None:
        """Count steps that the trainer has taken; nothing is sent here."""
        if self._stream is not None and not self.life.forked():
            self._stream.count(self._stream.steps + steps)

    def trains(self, module: nn.Module) -> bool:
        """Whether the optimizers that are followed train parameters of `module`."""
        trained = {id(each) for each in self.attachment.model.parameters() if each.requires_grad}
        return any(id(each) in trained for each in module.parameters())

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Send a snapshot of `model` as of `step`, by default the next one; it is copied when this returns."""
        if (stream := self._stream) is not None:
            self._send(model, partial(stream.advance, model, stream.steps + 1 if step is None else step))
            self._pulls.after_step(stream.steps)

    def replace(self, model: nn.Module, step: int | None = None) -> bool:
        """Have the averages become the weights of `model`, as of `step`, by default the last; False if not sent."""
        if (stream := self._stream) is None:
            return False
        return self._send(model, partial(stream.replace, model, stream.steps if step is None else step)) or False

    def before_weight_write(self, timeout_s: float) -> None:
        """The weights are about to be written by something that is not an optimizer.

        A last step that was skipped is sent first, if that takes no longer than `timeout_s`.
        """
        if self._stream is not None:
            self.attachment.settle()
            if timeout_s > 0:
                self._stream.catch_up(timeout_s)
            self._stream.forget_missed()
            self._stream.hold_back_writes()

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        """Wait until all that was sent is applied, or durable; False when it is not in time."""
        return self._stream is None or self._stream.sends_nothing or self.worker.flush(timeout_s, durable=durable)

    def publish(self, timeout_s: float) -> Answered:
        """Publish a generation to be kept, of everything up to the last step."""
        if self._stream is None:
            return Answered(0, None, "no run is joined")
        deadline = time.monotonic() + timeout_s
        self.attachment.settle()
        self._stream.catch_up(timeout_s)
        return self.worker.checkpoint(seconds_left(deadline))

    def checkpoint(self, step: int, timeout_s: float) -> bool:
        """Publish a generation to be kept; whether it includes `step`, or the newest step up to it that is sent."""
        if (stream := self._stream) is None or step < stream.steps:
            log.warning("ema: no checkpoint at step %d: the run is at step %d", step, self.steps or 0)
            return False
        if stream.rank > 0:  # rank 0 asks for the generation
            return self.flush(timeout_s, durable=False)
        answer = self.publish(timeout_s)
        return log_checkpoint(step, answer, stream.due_until(step))

    def publish_soon(self) -> None:
        """Ask for a generation of everything sent so far. Does not wait for it."""
        if self._stream is not None and not self.life.ended():
            self.worker.publish_soon()

    def rewind(self, step: int, timeout_s: float) -> int | None:
        """Take the run back to its newest generation at or before `step`; return that generation's step.

        A rank that sends nothing counts from `step` again and returns None.

        Raises:
            RewindError: there is none, or the server did not answer in time.
        """
        if self._stream is not None and self._stream.sends_nothing:
            self._stream.go_back(step)
            return None
        reached = self.worker.rewind(step, timeout_s)
        if self._stream is not None:
            self._stream.go_back(step)
        return reached

    def finish(self, timeout_s: float) -> bool:
        """Send what is left, have the run marked finished, and end; whether the finished run is durable."""
        if self.life.ended():
            if self.life.state is State.INERT and not self.life.forked():
                text = "ema: finish() did nothing: this client no longer streams run %s (see above)"
                log.warning(text, self._settings.run)
            return self.life.state is State.FINISHED
        deadline = time.monotonic() + timeout_s
        finished = False
        if (stream := self._stream) is not None:
            self.attachment.settle()
            if stream.sends_nothing:
                self._end(CLOSE_TIMEOUT_S, State.FINISHED)
                return True
            stream.catch_up(seconds_left(deadline))
            answer = self.worker.finish(seconds_left(deadline))
            if stream.rank > 0:
                answer = dataclasses.replace(answer, warning=None)  # rank 0 logs what concerns the run
            finished = log_finished(
                self._settings.run, answer, stream.last_due, stream.stopped, self.worker.stats().last_published_step
            )
            self.attachment.when_stepped_later(partial(_warn_stepped_later, self._settings.run))
        self._end(CLOSE_TIMEOUT_S, State.FINISHED if finished else State.CLOSED)
        return finished

    def close(self, timeout_s: float) -> None:
        """Leave the run open on the server and end; calling it again changes nothing."""
        if not self.life.ended():
            self._end(timeout_s, State.CLOSED)

    def stats(self) -> dict[str, Any]:
        """`stopped`, the counters, and the state of the connection."""
        stopped = None if self._stream is None else self._stream.stopped
        counters = Counters()
        counters.add(self.worker.counters)
        counters.add(self._pulls.counters)
        connection = {} if self.life.forked() else dataclasses.asdict(self.worker.stats())
        return {"stopped": stopped} | counters.to_json() | connection

    def _end(self, timeout_s: float, state: State) -> None:
        """Stop, and release the memory of host and device; the run stays as it is on the server."""
        self._pulls.close()
        self.attachment.remove()
        self.attachment = Attachment()  # the other one refers to this session
        self.worker.close(timeout_s)
        self._steps, self._stream = self.steps, None
        self._cancel_forgotten()
        self.life.state = state

    def _use(self, worker: Worker) -> None:
        self.worker = worker
        # An optimizer's hooks keep the session alive: a script may drop its client and go on training.
        self._cancel_forgotten = when_forgotten(self, self.life, partial(worker.close, CLOSE_TIMEOUT_S))

    def _send(self, model: nn.Module, send: Callable[[], bool | None]) -> bool | None:
        """Send a snapshot of `model`; if it has changed, do as `on_change` says."""
        stream = self._stream
        with self.worker.counters:
            try:
                return send()
            except PlanError as error:
                on_change = self._settings.on_change
                if stream is None or on_change is OnChange.RAISE:
                    raise
                if on_change is OnChange.RESTART and self._restart(model, stream.steps, error):
                    return stream.steps > 0
                if stream.stopped is None:
                    log.error("ema: run %s is no longer streamed, training goes on: %s", self._settings.run, error)
                    stream.stop(str(error))
                return False

    def _restart(self, model: nn.Module, steps: int, error: PlanError) -> bool:
        """Finish the run and begin a new one of its name with `model` as of `steps`; False if the run goes on."""
        run = self._settings.run
        try:
            plan_of(model, self._settings)
            worker = self._connect(self._settings)
        except (PlanError, ConnectError) as problem:
            log.error("ema: run %s cannot begin again: %s", run, problem)
            return False
        change = str(error).partition(";")[0]
        log.warning("ema: run %s ends before step %d and a new one of its name begins: %s", run, steps, change)
        self.worker.finish(_FINISH_TIMEOUT_S)
        worker.counters.add(self.worker.counters)
        self.worker.close(CLOSE_TIMEOUT_S)
        self._cancel_forgotten()
        self._use(worker)
        try:
            self._stream = Stream.join(worker, model, self._settings, max(steps - 1, 0), "never")
            if steps > 0:
                self._stream.advance(model, steps)
        # The run is over, and training goes on; nothing more can be done for the new one.
        except Exception as problem:  # noqa: BLE001
            log.error("ema: run %s is finished, and no new one has begun: %s", run, problem)
            self._end(CLOSE_TIMEOUT_S, State.INERT)
        return True

    def _hand_over(self, newer: Settings) -> None:
        """A newer session of this process asks for a run: if it is this one's, this one ends."""
        ours = self._settings
        if not self.life.ended() and (ours.endpoint, ours.run) == (newer.endpoint, newer.run):
            log.warning("ema: a newer client of this process takes over run %s; the older one stops", ours.run)
            self._end(CLOSE_TIMEOUT_S, State.INERT)

    def _take(self, model: nn.Module, overlap: bool) -> None:
        if self._stream is not None and not self.life.forked():
            self._send(model, partial(self._stream.take, model, overlap=overlap))
            self._pulls.after_step(self.steps or 0)

    def _hold_back_writes(self, optimizer: Optimizer | None = None) -> None:
        if self._stream is not None and not self.life.forked():
            self._stream.hold_back_writes(optimizer)


def _warn_stepped_later(run: str) -> None:
    if all(session.life.ended() for session in tuple(_streaming)):  # none streams the same optimizer's next run
        log.warning("ema: steps after finish() are neither counted nor sent (run %s)", run)
