"""The client as a training script sees it: steps, lifecycle, and who may call what when.

Comes in: models, optimizers, steps. Goes out: snapshots to a server, through a worker thread. After joining nothing
here raises into the training loop except for a programmer's error. Knows not how tensors are copied or bytes travel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

from torch import nn
from torch.optim import Optimizer

from ema_proto.averages.specs import AverageSpec
from ema_proto.wire.messages import Resume
from trainer_client.hooks import Attachment, check_optimizers
from trainer_client.lifecycle import State
from trainer_client.session import CLOSE_TIMEOUT_S, Session
from trainer_client.settings import Settings, check_state, check_step, check_timeout

log = logging.getLogger("ema")


class EmaClient:
    """Streams a model's weights to an EMA server while it trains.

    Args:
        endpoint: the server's address, `tcp://HOST:PORT`; default `EMA_ENDPOINT`.
        run: name of the run; default `EMA_RUN`, else one is generated and logged.
        averages: the rules, as strings or values (`"ema:0.9999"`, `Ema(0.9999)`, `"raw"`).
        samples_per_step: samples in an optimizer step, over all ranks, for averages that are given in samples; default
            `EMA_SAMPLES_PER_STEP`.
        steps_per_epoch: for averages that are given in epochs; default `EMA_STEPS_PER_EPOCH`.
        include: patterns of the names of the tensors to stream; all by default.
        exclude: patterns of names that are left out even so.
        trainable_only: stream only the parameters that require a gradient when the run is joined, no buffers.
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
        overlap: let snapshots of a model on a CUDA device be copied while training goes on; without it, as with
            `update`, they are copied when the step's hook returns.
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
        samples_per_step: float | None = None,
        steps_per_epoch: float | None = None,
        include: Iterable[str] | str = (),
        exclude: Iterable[str] | str = (),
        trainable_only: bool = False,
        step: int | None = None,
        every: int = 1,
        when_behind: Literal["skip", "wait"] = "skip",
        resume: Resume = "auto",
        token: str | None = None,
        config: Mapping[str, Any] | str | PathLike[str] | None = None,
        checksum: bool = False,
        connect_timeout_s: float = 5.0,
        wait_timeout_s: float = 30.0,
        overlap: bool = True,
        incarnation: int | None = None,
    ) -> None:
        settings = Settings.of(
            os.environ,
            endpoint=endpoint,
            run=run,
            averages=averages,
            samples_per_step=samples_per_step,
            steps_per_epoch=steps_per_epoch,
            include=include,
            exclude=exclude,
            trainable_only=trainable_only,
            step=step,
            every=every,
            when_behind=when_behind,
            resume=resume,
            token=token,
            config=config,
            checksum=checksum,
            connect_timeout_s=connect_timeout_s,
            wait_timeout_s=wait_timeout_s,
            overlap=overlap,
            incarnation=incarnation,
        )
        self._session = self._open(settings)
        if settings.run_generated:
            # A warning, so that it is seen where logging was not set up: readers need the name.
            log.warning("ema: the run is named %s (no name was given)", self.run)

    @property
    def run(self) -> str:
        """The run's name."""
        return self._session.settings.run

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, those before this client included."""
        return self._session.steps

    def attach(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> Attachment:
        """Join the run, and send a snapshot after every real step of `optimizer` from now on.

        Where an average of a new run begins with the weights of before the first step (`init=start`), they go first.

        Args:
            model: what to stream, wrapped (DDP, compiled) or not.
            optimizer: one, or several, of which the first counts steps: put first the one that steps last.

        Returns:
            A handle whose `remove()` stops the snapshots and leaves the run open.

        Raises:
            PlanError: the model holds something that cannot be streamed.
            JoinError: the server refuses the run.
            SettingsError: there is no optimizer, the client is attached already, or a CUDA graph is being captured.
        """
        optimizers = check_optimizers(optimizer)
        if not self._session.life.usable():
            return Attachment()
        return self._session.attach(model, optimizers)

    def update(self, model: nn.Module, step: SupportsIndex | None = None) -> None:
        """Send a snapshot of `model` by hand; the weights have been copied when this returns.

        The first call joins the run. A step that is not divisible by `every` or not above the last one sends nothing.

        Args:
            model: what to stream.
            step: real optimizer steps taken so far, the last one included; one more than at the last call by default.

        Raises:
            PlanError: the model cannot be streamed, or is not the one that the run was joined with.
            JoinError: the server refuses the run (first call).
            SettingsError: `step` is no step, or at the first call not above the steps already taken; or that call is
                captured into a CUDA graph.
            ClientClosed: the client was closed or finished.
        """
        if self._session.life.usable():
            self._session.update(model, None if step is None else check_step("step", step, 0))

    def before_weight_write(self) -> None:
        """Say that something other than an optimizer is about to write the weights, on a CUDA device, after `attach`.

        Writes through `.data` are seen by nobody and tear a snapshot that is being copied; other writes cost it. After
        this call the device finishes the copy before it does anything else on the current stream; nothing blocks here.
        """
        if self._session.life.usable():
            self._session.before_weight_write()

    def set(self, model: nn.Module) -> bool:
        """Have every average become the weights of `model`, as of the steps taken so far; the first call joins the run.

        Before the first step it gives averages with `init=start` what they begin with, if `update` is called by hand.

        Returns:
            True once the weights are copied; False when they could not be sent.

        Raises:
            PlanError, JoinError, ClientClosed: as of `update`.
        """
        return self._session.life.usable() and self._session.set(model)

    def flush(self, timeout_s: float = 60.0, *, durable: bool = False) -> bool:
        """Wait until all that was sent is applied (`durable`: published); False when it is not, or not in time."""
        usable = self._session.life.usable()
        return usable and self._session.flush(check_timeout("timeout_s", timeout_s), durable=durable)

    def checkpoint(self, step: SupportsIndex, timeout_s: float = 60.0) -> bool:
        """Publish a generation to go with the trainer's own checkpoint after `step` steps; the server keeps it longer.

        Returns:
            True once it is durable; False when that fails, takes too long, or `step` lies behind the run already.
        """
        if not self._session.life.usable():
            return False
        return self._session.checkpoint(check_step("step", step, 0), check_timeout("timeout_s", timeout_s))

    def rewind(self, step: SupportsIndex, timeout_s: float = 60.0) -> int | None:
        """Take the run back: the trainer is again where it was after `step` steps.

        Returns:
            The step of the generation that the averages went back to, the newest at or before `step`.

        Raises:
            RewindError: nothing is joined yet, there is no such generation, or the server did not answer in time.
        """
        if not self._session.life.usable():
            return None
        return self._session.rewind(check_step("step", step, 0), check_timeout("timeout_s", timeout_s))

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Send what is left, have the run published and marked finished, and close.

        Returns:
            True once the finished run is durable; False when nothing was joined, or not in time. Closed either way.
        """
        if self._session.life.ended():
            return self._session.life.state is State.FINISHED
        return self._session.finish(check_timeout("timeout_s", timeout_s))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Leave the run open on the server and stop; calling it again changes nothing."""
        if not self._session.life.ended():
            self._session.close(check_timeout("timeout_s", timeout_s))

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
        if self._session.life.usable():
            run, step = check_state(state)
            self._session.load(run, step, check_timeout("timeout_s", timeout_s))

    def stats(self) -> dict[str, Any]:
        """Counts since construction: snapshots offered, committed and skipped by reason, seconds blocked, and so on."""
        return self._session.stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def __repr__(self) -> str:
        endpoint, state = self._session.settings.endpoint, self._session.life.state.value
        return f"EmaClient(run={self.run!r}, endpoint={endpoint!r}, {state}, step={self.steps})"

    @staticmethod
    def _open(settings: Settings) -> Session:
        return Session.open(settings)
