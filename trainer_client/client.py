"""`EmaClient`: the public API. A `Session` does the work on rank 0; on other ranks there is none.

After joining, nothing here raises into the training loop except for a programmer's error.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

from torch import nn
from torch.optim import Optimizer

from ema_proto.averages.rules import AverageSpec
from ema_proto.wire.messages import Resume
from trainer_client.errors import RewindError, SettingsError
from trainer_client.lifecycle import State
from trainer_client.model.shards import as_module, holds_part
from trainer_client.pulling.average_reader import AverageReader
from trainer_client.pulling.pull import Pull, Pulls
from trainer_client.ranks import rank_of
from trainer_client.session import CLOSE_TIMEOUT_S, Session, connect
from trainer_client.settings import Settings, check_state, check_step, check_timeout
from trainer_client.steps.hooks import Attachment, Listener
from trainer_client.steps.optimizers import steppers_of
from trainer_client.stream import steps_before

log = logging.getLogger("ema")


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
        files: files that become part of every version from now on (tokenizer, processor, model card,
            `adapter_config.json`): paths, or a folder, of which hidden files, weights and subfolders with weights are
            left out. A folder's `config.json` is the config if none is given. They are read now, at most 64 MiB each,
            256 MiB and 256 files in all. None leaves the files of a run that goes on; an empty list ends them.
        checksum: send a CRC-32 with every chunk.
        connect_timeout_s: how long the constructor and joining wait for a server that does not answer.
        wait_timeout_s: how long `when_behind="wait"` waits at most.
        overlap: let snapshots of a model on a CUDA device be copied while training goes on; without it, as with
            `update`, they are copied when the step's hook returns.
        lane: how snapshots reach the server; default `EMA_LANE`, else `"auto"`: through shared memory if the server is
            on this machine and offers it, else through its socket. `"shm"` fails to join without shared memory, and
            `"zmq"` does not use it.
        incarnation: a higher one takes the run over from a lower one; default `TORCHELASTIC_RESTART_COUNT`, else 0.
        rank: only rank 0 streams, unless the model is sharded; the clients of other ranks count steps, and their other
            methods do nothing and return True or None. Default: torch.distributed's if initialised, else `RANK` where
            `WORLD_SIZE` is more than 1.

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
        files: Iterable[str | PathLike[str]] | str | PathLike[str] | None = None,
        checksum: bool = False,
        connect_timeout_s: float = 5.0,
        wait_timeout_s: float = 30.0,
        overlap: bool = True,
        lane: Literal["auto", "shm", "zmq"] | None = None,
        incarnation: int | None = None,
        rank: int | None = None,
    ) -> None:
        arguments = locals()  # each is a field of Settings, which validates it
        self._settings = Settings.of(os.environ, arguments)
        self._counted = 0  # steps, where there is no session that counts them
        self._pulls = Pulls()
        self._session: Session | None = None
        if (rank := rank_of(self._settings.rank, os.environ)) == 0:
            self._settings = self._settings.with_files()
            self._session = Session(self._settings, self._connect, self._pulls)
        else:
            log.info("ema: rank %d does not stream, unless the model is sharded: rank 0 does", rank)

    @property
    def run(self) -> str:
        """The run's name."""
        return self._settings.run

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, those before this client included."""
        if self._session is not None and self._session.steps is not None:
            return self._session.steps
        return (self._settings.step or 0) + self._counted

    def attach(self, model: nn.Module | Sequence[nn.Module], optimizer: Optimizer | Iterable[Optimizer]) -> Attachment:
        """Join the run, and send a snapshot after every real step of `optimizer` from now on.

        Where an average of a new run begins with the weights of before the first step (`init=start`), they go first.

        Args:
            model: what to stream, wrapped (DDP, compiled) or not. Of a sharded model (FSDP2, HSDP, tensor parallel)
                each rank streams its shards; of a pipeline, the stages that are given as a list.
            optimizer: one, as torch's or in a wrapper (Accelerate's, Lightning's, Lookahead, SAM); or several, of which
                the first counts steps. A step's snapshot is taken when the last of them has stepped, in whichever order
                and however often each steps.

        Returns:
            A handle whose `remove()` stops the snapshots and leaves the run open.

        Raises:
            PlanError: the model holds something that cannot be streamed, or is not the one of the run that is joined.
            JoinError: the server refuses the run; of a sharded model, also if not all ranks join within 60 s.
            ConnectError: on another rank than 0 of a sharded model, the server cannot be reached.
            SettingsError: there is no optimizer or its steps cannot be followed, the client is attached already, a
                CUDA graph is being captured, or the ranks of a sharded model do not know the run.
        """
        steppers, model = steppers_of(optimizer), as_module(model)
        if (session := self._session_for(model)) is None:
            counting = Listener(count=self._count, take=lambda: self._pulls.after_step(self.steps))
            return Attachment(model, steppers, counting) if self._is_other_rank else Attachment()
        if session.attachment.attached:
            raise SettingsError("the client is attached already: call remove() on the handle that attach() returned")
        if not session.joined:
            session.join(model, self._settings, self.steps)
            if session.lacks_start:
                session.replace(model)
        return session.attach(model, steppers)

    def update(self, model: nn.Module | Sequence[nn.Module], step: SupportsIndex | None = None) -> None:
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
        number, model = None if step is None else check_step("step", step, 0), as_module(model)
        if (session := self._session_for(model)) is None:
            self._count(1 if number is None else max(0, number - self.steps))
            self._pulls.after_step(self.steps)
            return
        if not session.joined:
            session.join(model, self._settings, steps_before(number, self._settings.step))
            if session.lacks_start:
                log.warning(
                    "ema: averages with init=start, and bema, begin with the first update: no set(model) came before it"
                )
        session.update(model, number)

    def pull(
        self,
        into: nn.Module,
        average: str = "ema",
        every: int = 100,
        *,
        url: str | None = None,
        token: str | None = None,
    ) -> Pull:
        """Keep an average in a module of this process: a teacher, a reference policy, a model to sample from.

        After each step that `every` divides, the server is asked to publish that step, and a thread downloads the
        version over HTTP and verifies it. After the next such step it is copied into the tensors of `into`, if it is
        whole by then, else one later. The training waits for nothing but that copy. On ranks other than 0 it works
        likewise. Ends with `remove()` of what is returned, `finish()` or `close()`.

        The module may be on another device and of another dtype. Its tensors are written in place; those that the
        average lacks are kept. One version at most is held meanwhile, in a temporary file that is mapped into memory.

        Args:
            into: what is written; not the model that is trained.
            average: the name of the average.
            every: optimizer steps from one version to the next. Each makes the server write all averages of the run.
            url: the server's address for readers; default `EMA_URL`, else `http://127.0.0.1:8080`.
            token: its token; default that of this client.

        Raises:
            SettingsError: an argument cannot be used, or the packages of the extra `reader` are missing.
            PlanError: the module has no tensors, or one that cannot be written, such as a sharded one.
            ClientClosed: the client was closed or finished.

        Afterwards nothing raises: an average that does not fit the module, for example, ends the pull with an error in
        the log and in `stats()`.
        """
        every = check_step("every", every, 1)
        self._check_pull(into, average)
        session = self._usable_session()
        pull = Pull(
            into,
            average,
            every,
            reader=AverageReader(url, self._settings.token if token is None else token, self.run),
            steps=lambda: self.steps,
            due_until=lambda step: step - step % self._settings.every,
            publish=(lambda: None) if session is None else session.publish_soon,
            counters=self._pulls.counters,
        )
        self._pulls.add(pull)
        if session is None and not self._is_other_rank:
            pull.remove()  # like every method here, it does nothing then
        return pull

    def before_weight_write(self, timeout_s: float = 0.0) -> None:
        """Say that something other than an optimizer is about to write the weights, on a CUDA device, after `attach`.

        Writes through `.data` cannot be detected and tear a snapshot that is being copied; other writes cost it. After
        this call the device finishes the copy before it does anything else on the current stream; nothing blocks here.

        Args:
            timeout_s: if the last step was skipped, on any device, wait so long to send it before it is overwritten.
        """
        timeout_s = check_timeout("timeout_s", timeout_s)
        if (session := self._usable_session()) is not None:
            session.before_weight_write(timeout_s)

    def set(self, model: nn.Module | Sequence[nn.Module]) -> bool:
        """Have every average become the weights of `model`, as of the steps taken so far; the first call joins the run.

        Before the first step it gives averages with `init=start` what they begin with, if `update` is called by hand.

        Returns:
            True once the weights are copied; False when they could not be sent.

        Raises:
            PlanError, JoinError, ClientClosed: as of `update`.
        """
        model = as_module(model)
        if (session := self._session_for(model)) is None:
            return self._is_other_rank
        if not session.joined:
            session.join(model, self._settings, self.steps)
        return session.replace(model)

    def flush(self, timeout_s: float = 60.0, *, durable: bool = False) -> bool:
        """Wait until all that was sent is applied (`durable`: published); False when it is not, or not in time."""
        if (session := self._usable_session()) is None:
            return self._is_other_rank
        return session.flush(check_timeout("timeout_s", timeout_s), durable=durable)

    def checkpoint(self, step: SupportsIndex, timeout_s: float = 60.0) -> bool:
        """Publish a generation to go with the trainer's own checkpoint after `step` steps; the server keeps it longer.

        Returns:
            True once a generation is durable whose averages include `step`, or the newest step up to it that `every`
            sends. False, with a line in the log, when it holds an older step, fails, takes too long, or `step` lies
            behind the run already.
        """
        if (session := self._usable_session()) is None:
            return self._is_other_rank
        number, timeout_s = check_step("step", step, 0), check_timeout("timeout_s", timeout_s)
        return session.checkpoint(number, timeout_s)

    def rewind(self, step: SupportsIndex, timeout_s: float = 60.0) -> int | None:
        """Take the run back: the trainer is again where it was after `step` steps.

        Returns:
            The step of the generation that the averages went back to, the newest at or before `step`. None on a rank
            that does not stream.

        Raises:
            RewindError: nothing is joined yet, there is no such generation, or the server did not answer in time.
        """
        number, timeout_s = check_step("step", step, 0), check_timeout("timeout_s", timeout_s)
        if (session := self._usable_session()) is None:
            self._count(number - self.steps)
            return None
        if not session.joined:
            raise RewindError("no run is joined yet: pass step= or call load_state_dict() before attach() or update()")
        return session.rewind(number, timeout_s)

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Send what is left, have the run published and marked finished, and close.

        Returns:
            True once the finished run is durable; the log says so if it ends with an older step than the trainer's.
            False when nothing was joined or sent, or not in time. Closed either way.
        """
        if self._session is None:
            self._pulls.close()
            return True
        return self._session.finish(check_timeout("timeout_s", timeout_s))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Leave the run open on the server and stop; calling it again changes nothing."""
        self._pulls.close()
        if self._session is not None:
            self._session.close(check_timeout("timeout_s", timeout_s))

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
        session = self._usable_session()
        if session is None and not self._is_other_rank:
            return
        is_other_run = self._settings.run_generated and run != self.run
        if session is None or not session.joined:
            self._settings, self._counted = dataclasses.replace(self._settings, step=step), 0
            if is_other_run:
                self._settings = dataclasses.replace(self._settings, run=run, run_generated=False)
        elif is_other_run:
            raise SettingsError(f"run {self.run!r} is joined and the state is of {run!r}: load it before attach()")
        elif step != self.steps:
            try:
                self.rewind(step, timeout_s)
            except RewindError as error:
                if step < self.steps:
                    raise
                text = (
                    f"{error}. The run was joined at step {self.steps}: load the state of step {step} before attach()"
                )
                if session.set_aside is not None:
                    text += f"; to continue the earlier run, which is kept as {session.set_aside}, pass that as run="
                raise RewindError(text) from None

    def stats(self) -> dict[str, Any]:
        """What became of the snapshots since construction, and the states of the client and of its connection.

        Returns:
            `run`, `steps`, and `client`: `open`, `finished`, `closed`, or `inert`: it does nothing, as on ranks other
            than 0 and after a newer client of this process took its run over. `stopped`: why nothing is sent since the
            model has changed. `skipped`: due snapshots that were not sent, by reason; `torn`: those whose weights were
            written meanwhile. `blocked_s_total`, `blocked_s_max`: seconds of the training loop in this client's code.
            What its threads and the server take from the loop meanwhile (cores, memory bandwidth, Python's lock) is not
            in them.
            `lane`: `shm` where the server reads snapshots in memory that it shares with this process, `zmq` where they
            go through its socket, None before joining. `state` of the connection: `disconnected`, `greeting`,
            `greeted`, `joining`, `streaming`, `closed`, or `failed`: the server refused for good. `reconnects`: how
            often it came back.
            `offered`, `committed` (also what a killed server had applied and lost), `dropped` (by reject code), and the
            newest steps sent, applied and published, as `last_offered_step` and so on.
            `pulls`: for each call of `pull`, the `average`, the `step` and `version` that the module holds, how often
            it was `copied`, and the `error` for which it has no newer one.
        """
        session = self._session
        own = {"run": self.run, "client": self._state.value, "steps": self.steps}
        rest = {"stopped": None} | self._pulls.counters.to_json() if session is None else session.stats()
        return own | rest | {"pulls": self._pulls.to_json()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def __repr__(self) -> str:
        state = self._state.value
        return f"EmaClient(run={self.run!r}, endpoint={self._settings.endpoint!r}, {state}, step={self.steps})"

    _connect = staticmethod(connect)

    @property
    def _state(self) -> State:
        return State.INERT if self._session is None else self._session.life.state

    @property
    def _is_other_rank(self) -> bool:
        return self._session is None

    def _check_pull(self, into: object, average: str) -> None:
        if not isinstance(into, nn.Module):
            raise SettingsError(f"into={type(into).__name__} is not a torch.nn.Module: pass the module to be written")
        if self._session is not None and self._session.trains(into):
            raise SettingsError("into= has parameters that are trained, and averages would overwrite them: pass a copy")
        if self._is_other_rank and self._settings.run_generated:
            raise SettingsError("other ranks must know the run that rank 0 streams: pass run=, or set EMA_RUN")
        names = [rule.name for rule in self._settings.averages]
        if average not in names:  # it may have been added on the server
            log.warning("ema: pull: %r is not among the averages of this client: %s", average, ", ".join(names))

    def _session_for(self, model: nn.Module) -> Session | None:
        """The usable session; made now on another rank than 0 if that holds a part of the model."""
        if self._session is None and holds_part(model):
            self._session = Session(self._settings, self._connect, self._pulls)
        return self._usable_session()

    def _usable_session(self) -> Session | None:
        """The session; None where nothing is to be done: on other ranks, in a fork, after another client took over.

        Raises:
            ClientClosed: the client was closed or finished.
        """
        return self._session if self._session is not None and self._session.life.usable() else None

    def _count(self, steps: int) -> None:
        """Count steps on another rank; a session counts its own."""
        if self._is_other_rank:
            self._counted += steps
