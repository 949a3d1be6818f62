"""The client as a training script sees it: steps, lifecycle, and who may call what when.

Comes in: models, optimizers, steps. Goes out: snapshots to a server, through a worker thread. After joining nothing
here raises into the training loop except for a programmer's error. Knows not how tensors are copied or bytes travel.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

from torch import nn
from torch.optim import Optimizer

from ema_proto.messages import Resume
from ema_proto.specs import AverageSpec
from trainer_client.counters import Counters
from trainer_client.errors import JoinError, RewindError, SettingsError
from trainer_client.hooks import Attachment, check_optimizers
from trainer_client.lifecycle import Lifecycle, State, when_forgotten
from trainer_client.settings import Settings, check_state, check_step, check_timeout
from trainer_client.stream import Stream, steps_before
from trainer_client.worker import Worker

log = logging.getLogger("ema")

_CLOSE_TIMEOUT_S = 5.0


class EmaClient:
    """Streams a model's weights to an EMA server while it trains.

    Args:
        endpoint: the server's address, `tcp://HOST:PORT`; default `EMA_ENDPOINT`.
        run: name of the run; default `EMA_RUN`, else one is generated and logged.
        averages: the rules, as strings or values (`"ema:0.9999"`, `Ema(0.9999)`, `"raw"`).
        step: optimizer steps already taken; 0 unless `load_state_dict` says otherwise.
        every: send the steps divisible by this.
        when_behind: with every slot still on its way, `"skip"` the snapshot, or `"wait"` while connected.
        resume: if the server knows the run, `"auto"` continues it, or takes it back to where this trainer is, and
            `"never"` sets it aside; `"must"` fails if there is nothing to continue.
        token: shared secret; default `EMA_TOKEN`.
        config: a dict, or the path of a JSON file, that becomes the versions' `config.json`.
        checksum: send a CRC-32 with every chunk.
        connect_timeout_s: how long the constructor and joining wait for a server that does not answer.
        wait_timeout_s: how long `when_behind="wait"` waits at most.
        incarnation: a higher one takes the run over from a lower one; default `TORCHELASTIC_RESTART_COUNT`, else 0.

    Raises:
        SettingsError: an argument cannot be used.
        ConnectError: the server cannot be reached, speaks another version, or refuses the token.

    One thread trains and calls these methods. In a forked child (a data loader's worker) they do nothing.

    Example:
        with EmaClient("tcp://127.0.0.1:5555", run="resnet34", averages=["ema:0.9999", "raw"]) as ema:
            ema.attach(model, optimizer)
            train(model, optimizer)
    """

    def __init__(
        self,
        endpoint: str | None = None,
        run: str | None = None,
        averages: Iterable[AverageSpec | str] = ("ema:0.9999",),
        *,
        step: int | None = None,
        every: int = 1,
        when_behind: Literal["skip", "wait"] = "skip",
        resume: Resume = "auto",
        token: str | None = None,
        config: Mapping[str, Any] | str | PathLike[str] | None = None,
        checksum: bool = False,
        connect_timeout_s: float = 5.0,
        wait_timeout_s: float = 30.0,
        incarnation: int | None = None,
    ) -> None:
        self._settings = Settings.of(
            os.environ,
            endpoint=endpoint,
            run=run,
            averages=averages,
            step=step,
            every=every,
            when_behind=when_behind,
            resume=resume,
            token=token,
            config=config,
            checksum=checksum,
            connect_timeout_s=connect_timeout_s,
            wait_timeout_s=wait_timeout_s,
            incarnation=incarnation,
        )
        self._life = Lifecycle()
        self._steps_known = self._settings.step
        self._counters = Counters()
        self._stream: Stream | None = None
        self._attachment = Attachment((), lambda: None)
        self._worker = self._open_worker(self._settings)
        self._cancel_forgotten = when_forgotten(self, self._life, partial(self._worker.close, _CLOSE_TIMEOUT_S))
        if self._settings.run_generated:
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

        Args:
            model: what to stream, wrapped (DDP, compiled) or not.
            optimizer: one, or several, of which the first counts steps: put first the one that steps last.

        Returns:
            A handle whose `remove()` stops the snapshots and leaves the run open.

        Raises:
            PlanError: the model holds something that cannot be streamed.
            JoinError: the server refuses the run.
            SettingsError: there is no optimizer, or the client is attached already.
        """
        optimizers = check_optimizers(optimizer)
        if not self._life.usable():
            return Attachment((), lambda: None)
        if self._attachment.attached:
            raise SettingsError("the client is attached already: call remove() on the handle that attach() returned")
        if self._stream is None:
            self._join(model, self.steps)
        self._attachment = Attachment(optimizers, partial(self._after_step, model))
        return self._attachment

    def update(self, model: nn.Module, step: SupportsIndex | None = None) -> None:
        """Send a snapshot of `model` by hand; the weights have been copied when this returns.

        The first call joins the run. A step that is not divisible by `every` or not above the last one sends nothing.

        Args:
            model: what to stream.
            step: real optimizer steps taken so far, the last one included; one more than at the last call by default.

        Raises:
            PlanError: the model cannot be streamed, or is not the one that the run was joined with.
            JoinError: the server refuses the run (first call).
            SettingsError: `step` is no step, or at the first call not above the steps already taken.
            ClientClosed: the client was closed or finished.
        """
        if not self._life.usable():
            return
        number = None if step is None else check_step("step", step, 0)
        stream = self._join(model, steps_before(number, self._steps_known)) if self._stream is None else self._stream
        with self._counters:
            stream.advance(model, stream.steps + 1 if number is None else number)

    def flush(self, timeout_s: float = 60.0, *, durable: bool = False) -> bool:
        """Wait until all that was sent is applied (`durable`: published); False when it is not, or not in time."""
        if not self._life.usable():
            return False
        return self._stream is None or self._worker.flush(check_timeout("timeout_s", timeout_s), durable=durable)

    def checkpoint(self, step: SupportsIndex, timeout_s: float = 60.0) -> bool:
        """Publish a generation to go with the trainer's own checkpoint after `step` steps; the server keeps it longer.

        Returns:
            True once it is durable; False when that fails, takes too long, or `step` lies behind the run already.
        """
        if not self._life.usable():
            return False
        number = check_step("step", step, 0)
        if self._stream is None or number < self.steps:
            log.warning("ema: no checkpoint at step %d: the run is at step %d", number, self.steps)
            return False
        return self._worker.checkpoint(check_timeout("timeout_s", timeout_s))

    def rewind(self, step: SupportsIndex, timeout_s: float = 60.0) -> int | None:
        """Take the run back: the trainer is again where it was after `step` steps.

        Returns:
            The step of the generation that the averages went back to, the newest at or before `step`.

        Raises:
            RewindError: nothing is joined yet, there is no such generation, or the server did not answer in time.
        """
        if not self._life.usable():
            return None
        number = check_step("step", step, 0)
        if self._stream is None:
            raise RewindError("no run is joined yet: pass step= or call load_state_dict() before attach() or update()")
        reached = self._worker.rewind(number, check_timeout("timeout_s", timeout_s))
        self._stream.steps = number
        return reached

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Send what is left, have the run published and marked finished, and close.

        Returns:
            True once the finished run is durable; False when nothing was joined, or not in time. Closed either way.
        """
        if self._life.ended():
            return self._life.state is State.FINISHED
        finished = self._stream is not None and self._worker.finish(check_timeout("timeout_s", timeout_s))
        if self._stream is not None and not finished:
            log.warning("ema: run %s is not finished on the server; what it has applied is kept there", self.run)
        self.close()
        self._life.state = State.FINISHED if finished else State.CLOSED
        return finished

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Leave the run open on the server and stop; calling it again changes nothing."""
        if self._life.ended():
            return
        self._attachment.remove()
        self._worker.close(check_timeout("timeout_s", timeout_s))
        self._cancel_forgotten()
        self._life.state = State.CLOSED

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the trainer's checkpoint: `{"run": name, "step": steps taken}`."""
        return {"run": self.run, "step": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], timeout_s: float = 60.0) -> None:
        """Go on where `state_dict()` was taken: before joining this sets run and step, afterwards it rewinds.

        A run name given to the constructor (or in `EMA_RUN`) stays.

        Raises:
            SettingsError: `state` is not what `state_dict()` returns, or another run is joined already.
            RewindError: see `rewind`.
        """
        if not self._life.usable():
            return
        run, step = check_state(state)
        if self._settings.run_generated and run != self.run:
            if self._stream is not None:
                raise SettingsError(f"run {self.run!r} is joined and the state is of {run!r}: load it before attach()")
            self._settings = dataclasses.replace(self._settings, run=run, run_generated=False)
        if self._stream is None:
            self._steps_known = step
        elif step != self.steps:
            self.rewind(step, timeout_s)

    def stats(self) -> dict[str, Any]:
        """Counts since construction: snapshots offered, committed and skipped by reason, seconds blocked, and so on."""
        worker = {} if self._life.forked() else dataclasses.asdict(self._worker.stats())
        own = {"run": self.run, "client": self._life.state.value, "steps": self.steps}
        return own | self._counters.to_json() | worker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def __repr__(self) -> str:
        endpoint, state = self._settings.endpoint, self._life.state.value
        return f"EmaClient(run={self.run!r}, endpoint={endpoint!r}, {state}, step={self.steps})"

    @staticmethod
    def _open_worker(settings: Settings) -> Worker:
        worker = Worker(settings.endpoint, token=settings.token)
        try:
            worker.greet(settings.connect_timeout_s)
        except BaseException:
            worker.close(0.0)
            raise
        return worker

    def _join(self, model: nn.Module, steps: int) -> Stream:
        try:
            self._stream = Stream.join(self._worker, model, self._settings, self._counters, steps)
        except JoinError:
            self.close()  # a session asks for one run, once
            raise
        return self._stream

    def _after_step(self, model: nn.Module) -> None:
        if self._life.forked() or self._stream is None:
            return
        with self._counters:
            self._stream.advance(model, self._stream.steps + 1)
