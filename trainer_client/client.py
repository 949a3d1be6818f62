"""`EmaClient`: joins a run, takes its snapshots, and ends it.

After joining, nothing here raises into the training loop except for a programmer's error.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

from torch import nn
from torch.optim import Optimizer

from ema_proto.averages.rules import AverageSpec, Ema
from ema_proto.sender.events import Answered
from ema_proto.wire.messages import Resume
from trainer_client.connection.worker import Worker, seconds_left
from trainer_client.counters import Counters
from trainer_client.errors import ConnectError, JoinError, PlanError, RewindError, SettingsError
from trainer_client.lifecycle import Lifecycle, State, when_forgotten
from trainer_client.messages import log_finished, log_joined
from trainer_client.ranks import rank_of
from trainer_client.settings import OnChange, Settings, check_state, check_step, check_timeout
from trainer_client.steps.hooks import Attachment, Listener
from trainer_client.steps.optimizers import steppers_of
from trainer_client.stream import Stream, plan_of, steps_before

log = logging.getLogger("ema")

_CLOSE_TIMEOUT_S = 5.0
_FINISH_TIMEOUT_S = 60.0

_streaming: weakref.WeakSet[EmaClient] = weakref.WeakSet()  # clients of this process that have joined a run


class EmaClient:
    """Streams a model's weights to an EMA server while it trains.

    Args:
        endpoint: the server's address, `tcp://HOST:PORT`; default `EMA_ENDPOINT`.
        run: name of the run; default `EMA_RUN`, else one is generated and logged.
        averages: the rules, as strings or values (`"ema:0.9999"`, `Ema(0.9999)`, `"raw"`). The default suits runs of
            any length: the last weights, and as `ema` an average whose half-life is at most 5 % of the steps so far.
        samples_per_step: samples in an optimizer step, over all ranks, for averages that are given in samples; default
            `EMA_SAMPLES_PER_STEP`.
        steps_per_epoch: for averages that are given in epochs; default `EMA_STEPS_PER_EPOCH`.
        include: patterns of the names of the tensors to stream; all by default.
        exclude: patterns of names to leave out, also where `include` matches.
        trainable_only: stream only the parameters that require a gradient when the run is joined, no buffers.
        step: optimizer steps already taken; 0 unless `load_state_dict` says otherwise.
        every: send the steps divisible by this.
        publish_every_steps: publish each average every so many steps, besides the server's own schedule and not more
            often than its `--publish-min-seconds` allows (10 s by default).
        when_behind: with every slot still on its way, `"skip"` the snapshot, or `"wait"` while connected.
        on_change: when the tensors of the model are no longer those that the run was joined with (an adapter added, the
            vocabulary resized, another dtype), `"stop"` sending and say so once, as an error in the log and in
            `stats()`; or `"raise"` PlanError from the step; or `"restart"`: finish the run, which is set aside under a
            dated name, and begin a new one with the model as it is, which holds up that step.
        resume: if the server knows the run, `"never"` sets it aside under a dated name and begins a new one; `"auto"`
            does so too for a trainer at step 0 that gave neither `step` nor `load_state_dict`, and else continues the
            run, or takes it back to where this trainer is; `"must"` fails if there is nothing to continue.
        token: shared secret; default `EMA_TOKEN`.
        config: a dict, or the path of a JSON file, that becomes the versions' `config.json`.
        checksum: send a CRC-32 with every chunk.
        connect_timeout_s: how long the constructor and joining wait for a server that does not answer.
        wait_timeout_s: how long `when_behind="wait"` waits at most.
        overlap: let snapshots of a model on a CUDA device be copied while training goes on; without it, as with
            `update`, they are copied when the step's hook returns.
        incarnation: a higher one takes the run over from a lower one; default `TORCHELASTIC_RESTART_COUNT`, else 0.
        rank: only rank 0 streams; the clients of others count steps, and their other methods do nothing and return True
            or None. Default: torch.distributed's if initialised, else `RANK` where `WORLD_SIZE` is more than 1.

    Raises:
        SettingsError: an argument cannot be used.
        ConnectError: the server cannot be reached, speaks another version, or refuses the token.

    One thread trains and calls these methods. In a forked child (a data loader's worker) they do nothing. A new client
    takes its run over from an older one of the same process, which then does nothing either.

    Example:
        with EmaClient("tcp://127.0.0.1:5555", run="resnet34", averages=["raw", "ema:0.999"]) as ema:
            ema.attach(model, optimizer)
            train(model, optimizer)
    """

    def __init__(
        self,
        endpoint: str | None = None,
        run: str | None = None,
        averages: Iterable[AverageSpec | str] = ("raw", "ema:0.9999,warmup=half_life,name=ema"),
        *,
        samples_per_step: float | None = None,
        steps_per_epoch: float | None = None,
        include: Iterable[str] | str = (),
        exclude: Iterable[str] | str = (),
        trainable_only: bool = False,
        step: int | None = None,
        every: int = 1,
        publish_every_steps: int | None = None,
        when_behind: Literal["skip", "wait"] = "skip",
        on_change: Literal["stop", "raise", "restart"] = "stop",
        resume: Resume = "auto",
        token: str | None = None,
        config: Mapping[str, Any] | str | PathLike[str] | None = None,
        checksum: bool = False,
        connect_timeout_s: float = 5.0,
        wait_timeout_s: float = 30.0,
        overlap: bool = True,
        incarnation: int | None = None,
        rank: int | None = None,
    ) -> None:
        arguments = locals()  # each is a field of Settings, which validates it
        settings = Settings.of(os.environ, arguments)
        self._settings = settings
        self._life = Lifecycle()
        self._steps_known = settings.step
        self._stream: Stream | None = None
        self._attachment = Attachment()
        self._rank = rank_of(settings.rank, os.environ)
        if self._rank != 0:
            log.info("ema: rank %d does not stream: rank 0 does", self._rank)
            self._life.state = State.INERT
            return
        self._worker = self._connect(settings)
        # An optimizer's hooks keep the client alive: a script may drop its own reference and go on training.
        self._cancel_forgotten = when_forgotten(self, self._life, partial(self._worker.close, _CLOSE_TIMEOUT_S))
        if settings.run_generated:
            # A warning, so that it is seen where logging was not set up: readers need the name.
            log.warning("ema: the run is named %s (no name was given)", self.run)

    @property
    def run(self) -> str:
        """The run's name."""
        return self._settings.run

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, those before this client included."""
        if self._stream is not None:
            return self._stream.steps
        return 0 if self._steps_known is None else self._steps_known

    def attach(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> Attachment:
        """Join the run, and send a snapshot after every real step of `optimizer` from now on.

        Where an average of a new run begins with the weights of before the first step (`init=start`), they go first.

        Args:
            model: what to stream, wrapped (DDP, compiled) or not.
            optimizer: one, as torch's or in a wrapper (Accelerate's, Lightning's, Lookahead, SAM); or several, of which
                the first counts steps. A step's snapshot is taken when the last of them has stepped, in whichever order
                and however often each steps.

        Returns:
            A handle whose `remove()` stops the snapshots and leaves the run open.

        Raises:
            PlanError: the model holds something that cannot be streamed, or is not the one of the run that is joined.
            JoinError: the server refuses the run.
            SettingsError: there is no optimizer or its steps cannot be followed, the client is attached already, or a
                CUDA graph is being captured.
        """
        steppers = steppers_of(optimizer)
        if not self._life.usable():
            return Attachment(model, steppers, Listener(count=self._count)) if self._rank else Attachment()
        if self._attachment.attached:
            raise SettingsError("the client is attached already: call remove() on the handle that attach() returned")
        stream = self._stream
        if stream is None:
            stream = self._join(model, self.steps)
            if self._lacks_start(stream):
                self._replace(model, stream.steps)
        overlap = stream.can_overlap(model)  # a model that is moved to a device later is copied when the hook returns
        stream.stopped = None
        self._attachment = Attachment(
            model,
            steppers,
            Listener(
                count=self._count,
                take=partial(self._take, model, overlap),
                before_write=self._hold_back_writes if overlap else lambda optimizer: None,
                when_removed=self._hold_back_writes,
            ),
        )
        return self._attachment

    def update(self, model: nn.Module, step: SupportsIndex | None = None) -> None:
        """Send a snapshot of `model` by hand; the weights have been copied when this returns.

        The first call joins the run. A step that is not divisible by `every` or not above the last one sends nothing.

        Args:
            model: what to stream.
            step: real optimizer steps taken so far, the last one included; one more than at the last call by default.

        Raises:
            PlanError: the model cannot be streamed (first call); with `on_change="raise"`, it has changed since then.
            JoinError: the server refuses the run (first call).
            SettingsError: `step` is no step, or at the first call not above the steps already taken; or that call is
                captured into a CUDA graph.
            ClientClosed: the client was closed or finished.
        """
        number = None if step is None else check_step("step", step, 0)
        if not self._life.usable():
            self._count(1 if number is None else max(0, number - self.steps))
            return
        stream = self._stream
        if stream is None:
            stream = self._join(model, steps_before(number, self._steps_known))
            if self._lacks_start(stream):
                log.warning("ema: averages with init=start begin with the first update: no set(model) came before it")
        with self._worker.counters:
            self._try(model, partial(stream.advance, model, stream.steps + 1 if number is None else number))

    def before_weight_write(self) -> None:
        """Say that something other than an optimizer is about to write the weights, on a CUDA device, after `attach`.

        Writes through `.data` cannot be detected and tear a snapshot that is being copied; other writes cost it. After
        this call the device finishes the copy before it does anything else on the current stream; nothing blocks here.
        """
        if self._life.usable() and self._stream is not None:
            self._attachment.settle()
            self._stream.forget_missed()
            self._stream.hold_back_writes()

    def set(self, model: nn.Module) -> bool:
        """Have every average become the weights of `model`, as of the steps taken so far; the first call joins the run.

        Before the first step it gives averages with `init=start` what they begin with, if `update` is called by hand.

        Returns:
            True once the weights are copied; False when they could not be sent.

        Raises:
            PlanError, JoinError, ClientClosed: as of `update`.
        """
        if not self._life.usable():
            return self._rank != 0
        stream = self._join(model, self.steps) if self._stream is None else self._stream
        return self._replace(model, stream.steps)

    def flush(self, timeout_s: float = 60.0, *, durable: bool = False) -> bool:
        """Wait until all that was sent is applied (`durable`: published); False when it is not, or not in time."""
        if not self._life.usable():
            return self._rank != 0
        timeout_s = check_timeout("timeout_s", timeout_s)
        return self._stream is None or self._worker.flush(timeout_s, durable=durable)

    def checkpoint(self, step: SupportsIndex, timeout_s: float = 60.0) -> bool:
        """Publish a generation to go with the trainer's own checkpoint after `step` steps; the server keeps it longer.

        Returns:
            True once a generation is durable whose averages include `step`, or the newest step up to it that `every`
            sends. False, with a line in the log, when it holds an older step, fails, takes too long, or `step` lies
            behind the run already.
        """
        if not self._life.usable():
            return self._rank != 0
        number, timeout_s = check_step("step", step, 0), check_timeout("timeout_s", timeout_s)
        if self._stream is None or number < self.steps:
            log.warning("ema: no checkpoint at step %d: the run is at step %d", number, self.steps)
            return False
        answer, due = self._publish(self._stream, timeout_s), self._stream.due_until(number)
        if answer.error is not None:
            log.warning("ema: no checkpoint at step %d: %s", number, answer.error)
        elif answer.step is None:
            log.warning("ema: no checkpoint at step %d: the run has no snapshot", number)
        elif answer.step < due:
            text = "ema: no checkpoint at step %d: the generation holds step %d, later steps were not applied"
            log.warning(text, number, answer.step)
        else:
            return True
        return False

    def rewind(self, step: SupportsIndex, timeout_s: float = 60.0) -> int | None:
        """Take the run back: the trainer is again where it was after `step` steps.

        Returns:
            The step of the generation that the averages went back to, the newest at or before `step`.

        Raises:
            RewindError: nothing is joined yet, there is no such generation, or the server did not answer in time.
        """
        if not self._life.usable():
            self._steps_known = check_step("step", step, 0) if self._rank else self._steps_known
            return None
        number, timeout_s = check_step("step", step, 0), check_timeout("timeout_s", timeout_s)
        if self._stream is None:
            raise RewindError("no run is joined yet: pass step= or call load_state_dict() before attach() or update()")
        reached = self._worker.rewind(number, timeout_s)
        self._stream.go_back(number)
        return reached

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Send what is left, have the run published and marked finished, and close.

        Returns:
            True once the finished run is durable; the log says so if it ends with an older step than the trainer's.
            False when nothing was joined or sent, or not in time. Closed either way.
        """
        if self._life.ended():
            if self._life.state is State.INERT and not self._rank and not self._life.forked():
                log.warning("ema: finish() did nothing: this client no longer streams run %s (see above)", self.run)
            return self._life.state is State.FINISHED or self._rank != 0
        deadline = time.monotonic() + check_timeout("timeout_s", timeout_s)
        finished = False
        if (stream := self._stream) is not None:
            self._attachment.settle()
            stream.catch_up(seconds_left(deadline))
            answer = self._worker.finish(seconds_left(deadline))
            finished = log_finished(self.run, answer, stream.last_due, stream.stopped)
            self._attachment.when_stepped_later(partial(_warn_stepped_later, self.run))
        self._end(_CLOSE_TIMEOUT_S, State.FINISHED if finished else State.CLOSED)
        return finished

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Leave the run open on the server and stop; calling it again changes nothing."""
        if not self._life.ended():
            self._end(check_timeout("timeout_s", timeout_s), State.CLOSED)

    def state_dict(self) -> dict[str, Any]:
        """The client's part of the trainer's checkpoint: `{"run": name, "step": steps taken}`."""
        return {"run": self.run, "step": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], timeout_s: float = 60.0) -> None:
        """Go on where `state_dict()` was taken: before joining this sets run and step, afterwards it rewinds.

        A run name given to the constructor (or in `EMA_RUN`) stays.

        Raises:
            SettingsError: `state` is not what `state_dict()` returns, or another run is joined already.
            RewindError: see `rewind`.
        """
        run, step = check_state(state)
        if not self._life.usable() and not self._rank:
            return
        if self._settings.run_generated and run != self.run:
            if self._stream is not None:
                raise SettingsError(f"run {self.run!r} is joined and the state is of {run!r}: load it before attach()")
            self._settings = dataclasses.replace(self._settings, run=run, run_generated=False)
        if self._stream is None:
            self._steps_known = step
        elif step != self.steps:
            self.rewind(step, timeout_s)

    def stats(self) -> dict[str, Any]:
        """What became of the snapshots since construction, and the states of the client and of its connection.

        Returns:
            `run`, `steps`, and `client`: `open`, `finished`, `closed`, or `inert`: it does nothing, as on ranks other
            than 0 and after a newer client of this process took its run over. `stopped`: why nothing is sent since the
            model has changed. `skipped`: due snapshots that were not sent, by reason; `torn`: those whose weights were
            written meanwhile. `blocked_s_total`, `blocked_s_max`: seconds of the training loop in this client's code.
            `state` of the connection: `disconnected`, `greeting`, `greeted`, `joining`, `streaming`, `closed`, or
            `failed`: the server refused for good. `reconnects`: how often it came back.
            `offered`, `committed` (also what a killed server had applied and lost), `dropped` (by reject code), and the
            newest steps sent, applied and published, as `last_offered_step` and so on.
        """
        stopped = None if self._stream is None else self._stream.stopped
        own = {"run": self.run, "client": self._life.state.value, "steps": self.steps, "stopped": stopped}
        counters = Counters() if self._rank else self._worker.counters
        worker = {} if self._rank or self._life.forked() else dataclasses.asdict(self._worker.stats())
        return own | counters.to_json() | worker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def __repr__(self) -> str:
        state = self._life.state.value
        return f"EmaClient(run={self.run!r}, endpoint={self._settings.endpoint!r}, {state}, step={self.steps})"

    @staticmethod
    def _connect(settings: Settings) -> Worker:
        return Worker.connect(settings.endpoint, settings.token, settings.connect_timeout_s)

    def _join(self, model: nn.Module, steps: int) -> Stream:
        """Join the run of `model` after `steps` steps; a refusal closes the client, which joins only once."""
        for other in tuple(_streaming):
            other._hand_over_to(self)
        # A script that runs again from its start, and has not asked to resume, begins a new run.
        begins = self._settings.resume == "auto" and self._steps_known is None and steps == 0
        resume: Resume = "never" if begins else self._settings.resume
        try:
            self._stream = Stream.join(self._worker, model, self._settings, steps, resume)
        except JoinError:
            self._end(_CLOSE_TIMEOUT_S, State.CLOSED)
            raise
        _streaming.add(self)
        log_joined(self.run, self._stream.joined, steps, self._stream.last_due)
        return self._stream

    def _try(self, model: nn.Module, send: Callable[[], bool | None]) -> bool | None:
        """Send a snapshot of `model`; if it has changed, do as `on_change` says."""
        stream = self._stream
        try:
            return send()
        except PlanError as error:
            on_change = self._settings.on_change
            if stream is None or on_change is OnChange.RAISE:
                raise
            if on_change is OnChange.RESTART and self._restart(model, stream.steps, error):
                return stream.steps > 0
            if stream.stopped is None:
                log.error("ema: run %s is no longer streamed, training goes on: %s", self.run, error)
                stream.stop(str(error))
            return False

    def _restart(self, model: nn.Module, steps: int, error: PlanError) -> bool:
        """Finish the run and begin a new one of its name with `model` as of `steps`; False if the run goes on."""
        try:
            plan_of(model, self._settings)
            worker = self._connect(self._settings)
        except (PlanError, ConnectError) as problem:
            log.error("ema: run %s cannot begin again: %s", self.run, problem)
            return False
        change = str(error).partition(";")[0]
        log.warning("ema: run %s ends before step %d and a new one of its name begins: %s", self.run, steps, change)
        self._worker.finish(_FINISH_TIMEOUT_S)
        worker.counters.add(self._worker.counters)
        self._worker.close(_CLOSE_TIMEOUT_S)
        self._cancel_forgotten()
        self._worker = worker
        self._cancel_forgotten = when_forgotten(self, self._life, partial(worker.close, _CLOSE_TIMEOUT_S))
        try:
            self._stream = Stream.join(worker, model, self._settings, max(steps - 1, 0), "never")
            if steps > 0:
                self._stream.advance(model, steps)
        # The run is over, and training goes on; nothing more can be done for the new one.
        except Exception as problem:  # noqa: BLE001
            log.error("ema: run %s is finished, and no new one has begun: %s", self.run, problem)
            self._end(_CLOSE_TIMEOUT_S, State.INERT)
        return True

    def _lacks_start(self, stream: Stream) -> bool:
        starts = any(isinstance(rule, Ema) and rule.init == "start" for rule in self._settings.averages)
        return starts and stream.joined.continuation == "new"

    def _replace(self, model: nn.Module, step: int) -> bool:
        """Have the averages become the weights of `model`, as of `step`; False when they could not be sent."""
        if self._stream is None:
            return False
        with self._worker.counters:
            return self._try(model, partial(self._stream.replace, model, step)) or False

    def _publish(self, stream: Stream, timeout_s: float) -> Answered:
        """Publish a generation to be kept, of everything up to the last step."""
        deadline = time.monotonic() + timeout_s
        self._attachment.settle()
        stream.catch_up(timeout_s)
        return self._worker.checkpoint(seconds_left(deadline))

    def _end(self, timeout_s: float, state: State) -> None:
        """Stop, and release the memory of host and device; the run stays as it is on the server."""
        self._attachment.remove()
        self._attachment = Attachment()  # the other one refers to this client
        self._worker.close(timeout_s)
        self._steps_known, self._stream = self.steps, None
        self._cancel_forgotten()
        self._life.state = state

    def _hand_over_to(self, newer: EmaClient) -> None:
        """A newer client of this process asks for a run: if it is this one's, this one ends."""
        ours, theirs = self._settings, newer._settings
        if not self._life.ended() and (ours.endpoint, ours.run) == (theirs.endpoint, theirs.run):
            log.warning("ema: a newer client of this process takes over run %s; the older one stops", ours.run)
            self._end(_CLOSE_TIMEOUT_S, State.INERT)

    def _count(self, steps: int) -> None:
        if self._rank:
            self._steps_known = self.steps + steps
        elif self._stream is not None and not self._life.forked():
            self._stream.count(self._stream.steps + steps)

    def _take(self, model: nn.Module, overlap: bool) -> None:
        if self._stream is not None and not self._life.forked():
            with self._worker.counters:
                self._try(model, partial(self._stream.take, model, overlap=overlap))

    def _hold_back_writes(self, optimizer: Optimizer | None = None) -> None:
        if self._stream is not None and not self._life.forked():
            self._stream.hold_back_writes(optimizer)


def _warn_stepped_later(run: str) -> None:
    if all(client._life.ended() for client in tuple(_streaming)):  # none streams the same optimizer's next run
        log.warning("ema: steps after finish() are neither counted nor sent (run %s)", run)
