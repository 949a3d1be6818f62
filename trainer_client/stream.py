"""The steps and snapshots of one joined run: slot, live tensors, copy, off it goes.

Comes in: the model after a step. Goes out: a filled slot to the worker, or a counted skip. Never waits unless it was
told to, and lets nothing out but a programmer's error. Knows no optimizer and no lifecycle.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.optim import Optimizer

from ema_proto.averages.rules import check_matches
from ema_proto.errors import LocalProtocolError
from ema_proto.sender.machine import SenderState
from ema_proto.wire.messages import Join, Mode
from trainer_client.connection.transport import Transport
from trainer_client.counters import Counters, Skip
from trainer_client.errors import PlanError, SettingsError
from trainer_client.missed import Missed
from trainer_client.model.plan import Plan
from trainer_client.model.selection import Selection
from trainer_client.settings import Settings, WhenBehind
from trainer_client.staging.stagers import Stagers

log = logging.getLogger("ema")


class Stream:
    """Counts a run's steps and takes its snapshots; owned by the training thread.

    Args:
        transport: has joined the run.
        plan: what it was joined with.
        settings: `every`, whether copies may overlap, and whether to wait when behind.
        counters: told of everything.
        steps: optimizer steps already taken.
    """

    def __init__(self, transport: Transport, plan: Plan, settings: Settings, counters: Counters, steps: int) -> None:
        self.steps = steps
        self._transport = transport
        self._worker = transport.worker
        self._plan = plan
        self._stagers = Stagers(plan.manifest, self._worker.slots, transport.pins, transport.device_of)
        self._overlap = settings.overlap
        self._every = settings.every
        self._wait_s = settings.wait_timeout_s if settings.when_behind is WhenBehind.WAIT else 0.0
        self._counters = counters
        self._told: set[Skip] = set()
        self._missed: Missed | None = None

    @classmethod
    def join(cls, transport: Transport, model: nn.Module, settings: Settings, counters: Counters, steps: int) -> Stream:
        """Plan the snapshots of `model` and join the run after `steps` steps.

        Raises:
            PlanError: the model holds something that cannot be streamed.
            JoinError: the server refuses the run, or does not answer.
            SettingsError: a graph is being captured: what joining does would spoil it.
        """
        plan = Plan.of(model, Selection(settings.include, settings.exclude, settings.trainable_only))
        devices = {tensor.device for tensor in plan.tensors()}
        if any(device.is_capturing() for device in map(transport.device_of, devices) if device is not None):
            raise SettingsError(
                "a run cannot be joined while a CUDA graph is captured: call attach() or update() before"
            )
        _check_matches(plan, settings)
        join = Join(
            run=settings.run,
            first_step=steps + 1,
            manifest=plan.manifest,
            averages=settings.averages,
            every=settings.every,
            resume=settings.resume,
            incarnation=settings.incarnation,
            checksum=settings.checksum,
            config=settings.config,
            step_units=settings.step_units,
        )
        # Slots made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            transport.worker.join(join, settings.connect_timeout_s)
        stream = cls(transport, plan, settings, counters, steps)
        stream._stagers.prepare(plan.tensors())  # memory is locked now and not at the first step
        return stream

    def can_overlap(self, model: nn.Module) -> bool:
        """Whether copies of `model` can go on while training does, if someone calls `hold_back_writes`."""
        return self._overlap and self._stagers.prepare(self._plan.renewed(model).tensors())

    def hold_back_writes(self, optimizer: Optimizer | None = None) -> None:
        """Have the device end a copy under way before it writes parameters of `optimizer` (default: anything)."""
        if optimizer is None:
            self._missed = None
        if not self._stagers.is_copying:
            return
        try:
            groups = None if optimizer is None else optimizer.param_groups
            self._stagers.hold_back_writes(None if groups is None else [p for group in groups for p in group["params"]])
        # The snapshot is spoiled then, and not sent; as with a copy, that is no reason to end a training.
        except Exception as error:  # noqa: BLE001
            self._skip(Skip.ERROR, f"the copy of step {self.steps} could not be waited for: {error!r}", error)

    def advance(self, model: nn.Module, step: int, *, overlap: bool = False) -> None:
        """The trainer has taken `step` steps: send a snapshot if one is due.

        Args:
            model: what was trained.
            step: how many steps.
            overlap: the weights may be copied later than this returns; otherwise they are copied then.

        Raises:
            PlanError: the model's tensors are no longer those that the run was joined with.
        """
        if self._is_capturing(step):
            return
        if step <= self.steps:
            self._skip(Skip.REPEATED, f"step {step} is not above {self.steps}; after going back call rewind()")
            return
        self.steps = step
        if step % self._every == 0:
            self._snapshot(model, step, self._wait_s, overlap=overlap)

    def catch_up(self, wait_s: float) -> None:
        """Send the step that was skipped last for want of a slot, if the weights are still those of that step.

        Without it a run that ends while the server is behind would lose the very weights that it is about.

        Args:
            wait_s: how long to wait for a slot, in seconds.
        """
        missed, self._missed = self._missed, None
        if missed is None or not missed.is_as_it_was():
            return
        self._counters.skipped[missed.reason] -= 1  # if it is skipped again it is counted again
        try:
            self._snapshot(missed.model, missed.step, wait_s)
        except PlanError:  # another model than at that step
            self._counters.skipped[missed.reason] += 1

    def replace(self, model: nn.Module, step: int) -> bool:
        """Have every average become the weights of `model`, as of `step`; whether they were sent. As `advance` else."""
        if self._is_capturing(step):
            return False
        self.steps = max(step, self.steps)
        return self._snapshot(model, step, self._wait_s, "set")

    def _snapshot(
        self, model: nn.Module, step: int, wait_s: float, mode: Mode = "update", *, overlap: bool = False
    ) -> bool:
        self._missed = None
        try:
            slot = self._worker.acquire(wait_s)
            if slot is None:
                reason = self._skip_none(step)
                if mode == "update":
                    self._missed = Missed(model, step, self._plan.renewed(model).tensors(), reason)
                return False
            try:
                self._plan = self._plan.renewed(model)
                transfer = self._stagers.stage(self._plan.tensors(), slot)
                if transfer is not None and not overlap:
                    transfer.wait()
            except BaseException:
                self._worker.give_back(slot)
                raise
            self._transport.offer(transfer, slot, step, mode)
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
        except RuntimeError:  # the device's own: the copy meets it too, and tells
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
        reason = self._why_none()
        if reason is Skip.BUSY:
            text = f"step {step} was skipped, the snapshots before it are still on their way"
            self._skip(reason, text + "; when_behind='wait' waits for them, every= sends fewer")
        else:
            self._counters.skipped[reason] += 1  # the connection's thread says what is wrong
        return reason

    def _skip(self, reason: Skip, text: str, error: Exception | None = None) -> None:
        self._counters.skipped[reason] += 1
        if reason not in self._told:
            log.warning("ema: %s (said once, then only counted)", text, exc_info=error)
        self._told.add(reason)


def _check_matches(plan: Plan, settings: Settings) -> None:
    try:
        check_matches(settings.averages, [tensor.name for tensor in plan.manifest.tensors])
    except LocalProtocolError as error:
        raise PlanError(str(error)) from None


def steps_before(step: int | None, known: int | None) -> int:
    """Steps already taken when the first update is the one after step `step`; `known` is what was said of them before.

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
