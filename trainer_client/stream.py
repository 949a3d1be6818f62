"""The steps of a joined run: takes a snapshot when one is due, or counts why not.

A snapshot is a slot, filled from the live tensors and offered to the worker. Waits only where the settings say so, and
raises only for a programmer's error.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ema_proto.averages.rules import Ema, check_matches
from ema_proto.averages.step_units import half_life_steps, needed_of
from ema_proto.errors import LocalProtocolError
from ema_proto.sender.events import SenderState
from ema_proto.wire.manifest import Role
from ema_proto.wire.messages import Join, Joined, Mode, Resume
from ema_proto.wire.parts import from_ranges
from trainer_client.companions import CompanionFile, check_companions
from trainer_client.connection.worker import Worker
from trainer_client.counters import Skip
from trainer_client.errors import GatheredError, PlanError, SettingsError
from trainer_client.model import adapters
from trainer_client.model.plan import Plan
from trainer_client.model.selection import Selection
from trainer_client.model.sources import version_of
from trainer_client.ranks import Place, place_of
from trainer_client.settings import Lane, Settings, WhenBehind
from trainer_client.staging.stagers import Stagers
from trainer_client.steps.watch import Watch
from trainer_client.throughput import Throughput

log = logging.getLogger("ema")

_HOST_CHARS_MAX = 255  # of the wire


@dataclass(frozen=True, slots=True)
class _Missed:
    """The newest snapshot that was due and found no slot: it can still be sent while its tensors are unchanged."""

    model: nn.Module
    step: int
    versions: tuple[tuple[Tensor, int], ...]
    reason: Skip

    def is_unchanged(self) -> bool:
        """Whether no tensor was written since; for what is not seen see `Stream._shows_writes`."""
        return all(version_of(tensor) == version for tensor, version in self.versions)


class Stream:
    """Counts a run's steps and takes its snapshots; the training thread's.

    Args:
        worker: has joined the run.
        joined: the server's answer to that.
        plan: the snapshots' tensors; of one rank of several, those that it sends.
        settings: `every`, whether copies may overlap, and whether to wait when behind.
        steps: optimizer steps already taken.
        place: of this rank among those that stream the run.

    Attributes:
        steps: optimizer steps taken so far.
        joined: as given.
        rank: of this process among those that stream the run.
        stopped: why nothing is sent any longer; None while snapshots are sent.
    """

    def __init__(
        self, worker: Worker, joined: Joined, plan: Plan, settings: Settings, steps: int, place: Place
    ) -> None:
        self.steps = steps
        self.joined = joined
        self.stopped: str | None = None
        self._worker = worker
        self.rank = place.rank
        self._has_peers = place.world > 1
        self._plan = plan
        self._stagers = Stagers(plan.manifest, worker.slots, worker.pins, worker.device_of)
        self._overlap = settings.overlap
        self._every = settings.every
        self._wait_s = settings.wait_timeout_s if settings.when_behind is WhenBehind.WAIT else 0.0
        self._counters = worker.counters
        self._warned: set[Skip] = set()
        self._last_skip: Skip | None = None
        tensors = plan.tensors()
        roles = [spec.role for spec in plan.manifest.tensors]
        trained = [each for each, role in zip(tensors, roles, strict=True) if role is Role.PARAM]
        self._watch = Watch(trained, steps)
        # Whether the last step raised the version of a parameter, if steps are given by hand. Those of fused optimizers
        # do not, nor those of `foreach` ones on sharded parameters, nor writes through `.data`: the weights may then
        # change without a sign. With `attach`, each step is counted.
        self._shows_writes = True
        self._first_trained = weakref.ref(trained[0]) if trained else lambda: None
        self._last_version = self._version()
        worker.watch(self._watch.look)
        self._counted = False  # a step whose snapshot is still to be taken
        self._missed: _Missed | None = None
        self._stagers.prepare(tensors)  # memory is locked now and not at the first step
        lane = worker.stats().lane or Lane.ZMQ
        self._throughput = Throughput(plan.manifest.nbytes, settings.every, lane) if place.rank == 0 else None

    @classmethod
    def join(cls, worker: Worker, model: nn.Module, settings: Settings, steps: int, resume: Resume) -> Stream:
        """Plan the snapshots of `model` and join the run after `steps` steps.

        Raises:
            PlanError: the model holds something that cannot be streamed.
            JoinError: the server refuses the run, or does not answer.
            SettingsError: a graph is being captured: what joining does would spoil it.
        """
        plan = plan_of(model, settings)
        place = place_of(settings.incarnation) if plan.is_sharded else Place()
        if place.world > 1 and settings.run_generated:
            raise SettingsError("the ranks of a sharded model must know the run: pass run=, or set EMA_RUN")
        devices = {tensor.device for tensor in plan.tensors()}
        if any(device.is_capturing() for device in map(worker.device_of, devices) if device is not None):
            raise SettingsError(
                "a run cannot be joined while a CUDA graph is captured: call attach() or update() before"
            )
        files = _with_adapter_config(settings.companions, plan) if place.rank == 0 else None
        join = Join(
            run=settings.run,
            first_step=steps + 1,
            manifest=plan.manifest,
            averages=settings.averages,
            every=settings.every,
            publish_every_steps=settings.publish_every_steps,
            resume=resume,
            incarnation=settings.incarnation,
            checksum=settings.checksum,
            config=settings.config,
            samples_per_step=settings.samples_per_step,
            steps_per_epoch=settings.steps_per_epoch,
            host=socket.gethostname()[:_HOST_CHARS_MAX],
            pid=os.getpid(),
            files=None if files is None else tuple(file.spec for file in files),
            rank=place.rank,
            world=place.world,
            gang=place.gang,
        )
        # Slots made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            joined = worker.join(join, settings.connect_timeout_s, tuple(file.data for file in files or ()))
        _log_half_lives(settings)
        if joined.send is not None:
            plan = plan.part(from_ranges(joined.send, len(plan.held.tensors)))
        return cls(worker, joined, plan, settings, steps, place)

    @property
    def sends_nothing(self) -> bool:
        """Whether all that this rank holds is sent by other ranks."""
        return not self._plan.manifest.tensors

    @property
    def last_due(self) -> int:
        """The newest step so far that `every` sends."""
        return self.due_until(self.steps)

    def due_until(self, step: int) -> int:
        """The newest step that `every` sends, up to `step`."""
        return step - step % self._every

    def can_overlap(self, model: nn.Module) -> bool:
        """Whether copies of `model` can go on while training does, provided that `hold_back_writes` is called."""
        return self._overlap and self._stagers.prepare(self._plan.renewed(model).tensors())

    def hold_back_writes(self, optimizer: Optimizer | None = None) -> None:
        """Have the device end a copy under way before it writes parameters of `optimizer` (default: anything)."""
        if not self._stagers.is_copying:
            return
        try:
            groups = None if optimizer is None else optimizer.param_groups
            self._stagers.hold_back_writes(None if groups is None else [p for group in groups for p in group["params"]])
        # The snapshot is then torn and not sent; as with a copy, that is no reason to end a training.
        except Exception as error:  # noqa: BLE001
            self._skip(Skip.ERROR, f"the copy of step {self.steps} could not be waited for: {error!r}", error)

    def forget_missed(self) -> None:
        """The weights are about to change in a way that their versions do not show."""
        self._missed = None

    def advance(self, model: nn.Module, step: int, *, overlap: bool = False) -> None:
        """The trainer has taken `step` steps: send a snapshot if one is due.

        Args:
            model: what was trained.
            step: how many steps.
            overlap: the weights may be copied later than this returns; otherwise they are copied then.

        Raises:
            PlanError: the model's tensors are no longer those that the run was joined with.
        """
        self.count(step)
        version = self._version()
        self._shows_writes, self._last_version = version != self._last_version, version
        self.take(model, overlap=overlap)

    def count(self, step: int) -> None:
        """The trainer has taken `step` steps; the snapshot of the last one is to be taken by `take`."""
        self._counted = False
        if self._is_capturing(step):
            return
        if step <= self.steps:
            self._skip(Skip.REPEATED, f"step {step} is not above {self.steps}; after going back call rewind()")
            return
        self.steps, self._counted = step, True
        self._watch.steps = step

    def take(self, model: nn.Module, *, overlap: bool = False) -> None:
        """Send a snapshot of the step counted last, once, if `every` sends it."""
        counted, self._counted = self._counted, False
        if not counted or self.steps % self._every or self.sends_nothing:
            return
        if self._throughput is not None:
            self._throughput.due(time.perf_counter(), self._counters.blocked_s_total)
            if self._throughput.log(self._worker.applying_s()):
                self._throughput = None
        sent = not self._is_stopped() and self._snapshot(model, self.steps, self._wait_s, overlap=overlap)
        if not sent and self._has_peers:
            self._worker.skip(self.steps, self.stopped or f"{self._last_skip}, see its log")

    def _version(self) -> int | None:
        tensor = self._first_trained()
        return None if tensor is None else version_of(tensor)

    def stop(self, reason: str) -> None:
        """Send nothing more, and count each snapshot that is due, beginning with the one that failed."""
        self.stopped = reason
        self._is_stopped()

    def _is_stopped(self) -> bool:
        self._counters.skipped[Skip.CHANGED] += self.stopped is not None
        return self.stopped is not None

    def go_back(self, step: int) -> None:
        """The trainer is again where it was after `step` steps."""
        self.steps, self._counted, self._missed = step, False, None

    def catch_up(self, wait_s: float) -> None:
        """Send the newest step if it found no slot and the weights are still those of that step.

        A run that ends while the server is behind or away would lose its last weights otherwise.

        Args:
            wait_s: how long to wait for a slot and for the connection, in seconds.
        """
        missed, self._missed = self._missed, None
        if self._has_peers:
            return  # the other ranks have dropped that step
        if missed is None or missed.step != self.steps or not self._shows_writes or not missed.is_unchanged():
            return
        self._counters.skipped[missed.reason] -= 1  # if it is skipped again it is counted again
        try:
            self._snapshot(missed.model, missed.step, wait_s, reconnecting=True)
        except PlanError:  # another model than at that step
            self._counters.skipped[missed.reason] += 1

    def replace(self, model: nn.Module, step: int) -> bool:
        """Have every average become the weights of `model`, as of `step`; whether they were sent."""
        if self._is_capturing(step) or self._is_stopped():
            return False
        self.steps = max(step, self.steps)
        return self.sends_nothing or self._snapshot(model, step, self._wait_s, "set")

    def _snapshot(
        self,
        model: nn.Module,
        step: int,
        wait_s: float,
        mode: Mode = "update",
        *,
        overlap: bool = False,
        reconnecting: bool = False,
    ) -> bool:
        self._missed = None
        try:
            slot = self._worker.acquire(wait_s, reconnecting=reconnecting)
            if slot is None:
                reason = self._skip_none(step)
                if mode == "update":
                    versions = tuple((tensor, version_of(tensor)) for tensor in self._plan.renewed(model).tensors())
                    self._missed = _Missed(model, step, versions, reason)
                return False
            try:
                began = time.perf_counter()
                self._plan = self._plan.renewed(model)
                transfer = self._stagers.stage(self._plan.live(), slot, self._plan.check)
                if transfer is not None and not overlap:
                    transfer.wait()
            except BaseException:
                self._worker.give_back(slot)
                raise
            self._worker.offer(slot, step, mode, transfer)
            if self._throughput is not None:
                self._throughput.copied(time.perf_counter() - began)
        except GatheredError as error:
            text = f"step {step} was not sent, because FSDP has gathered parameter {error} for a forward pass"
            self._skip(Skip.GATHERED, f"{text}: call update() after optimizer.step(), or model.reshard() before it")
            return False
        except PlanError:
            raise
        # The trainer comes first: whatever else is wrong with a copy for an average is no reason to end a training.
        except Exception as error:  # noqa: BLE001
            self._skip(Skip.ERROR, f"step {step} was not sent, training goes on: {error!r}", error)
            return False
        return True

    def _is_capturing(self, step: int) -> bool:
        try:
            capturing = self._stagers.is_capturing()
        except RuntimeError:  # the device's own: the copy meets it too, and reports it
            return False
        if capturing:
            text = f"step {step} is being captured into a CUDA graph, not taken"
            self._skip(Skip.CAPTURING, f"{text}: call update(model, step) after each replay")
        return capturing

    def _why_none(self) -> Skip:
        state = self._worker.stats().state
        if state == SenderState.STREAMING.value:
            return Skip.BUSY
        return Skip.STOPPED if state in (SenderState.FAILED.value, SenderState.CLOSED.value) else Skip.OFFLINE

    def _skip_none(self, step: int) -> Skip:
        reason = self._last_skip = self._why_none()
        if reason is Skip.BUSY:
            self._skip(
                reason,
                f"step {step} was skipped, because the snapshots before it are still being sent. The averages stay "
                "correct: skipped steps count as gaps, and the next snapshot is weighed with the exact decay over the "
                "gap. when_behind='wait' sends every step, every=N fewer",
            )
        else:
            self._counters.skipped[reason] += 1
            self._worker.log_outage()  # a refusal was logged by the connection's thread
        return reason

    def _skip(self, reason: Skip, text: str, error: Exception | None = None) -> None:
        self._counters.skipped[reason] += 1
        self._last_skip = reason
        if reason not in self._warned:
            log.warning("ema: %s. Further ones are only counted, in stats()['skipped']", text, exc_info=error)
        self._warned.add(reason)


def plan_of(model: nn.Module, settings: Settings) -> Plan:
    """The plan of what the settings choose of `model`.

    Raises:
        PlanError: it cannot be streamed, or an average's patterns match nothing of it.
    """
    plan = Plan.of(model, Selection(settings.include, settings.exclude, settings.trainable_only))
    if plan.is_sharded:
        return plan  # the server compares patterns with the tensors of all ranks
    try:
        check_matches(settings.averages, [tensor.name for tensor in plan.manifest.tensors])
    except LocalProtocolError as error:
        raise PlanError(str(error)) from None
    return plan


def _with_adapter_config(files: tuple[CompanionFile, ...] | None, plan: Plan) -> tuple[CompanionFile, ...] | None:
    """The files, and where an adapter is streamed, its `adapter_config.json` if that is not among them."""
    if plan.adapter is None or any(file.spec.name == adapters.CONFIG_FILE for file in files or ()):
        return files
    return check_companions((*(files or ()), CompanionFile.of(adapters.CONFIG_FILE, plan.adapter.config())))


def _log_half_lives(settings: Settings) -> None:
    for rule in settings.averages:
        if isinstance(rule, Ema) and needed_of(rule) is not None:
            half_life = half_life_steps(rule, settings.step_units)
            text = "ema: average %s has a half-life of %g steps, a decay of %.10g at each"
            log.info(text, rule.name, half_life, 0.5 ** (1 / half_life))


def steps_before(step: int | None, known: int | None) -> int:
    """Steps already taken when the first update is that of `step`; `known` is their number if it was given before.

    Raises:
        SettingsError: `step` is not above those.
    """
    taken = 0 if known is None else known
    if step is not None and step <= taken:
        raise SettingsError(
            f"step={step} at the first update, but {taken} steps were taken before it: "
            "a step is the number of optimizer steps taken so far, the last one included"
        )
    return taken if step is None or known is not None else step - 1
