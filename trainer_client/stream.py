"""The steps and snapshots of one joined run: slot, live tensors, copy, off it goes.

Comes in: the model after a step. Goes out: a filled slot to the worker, or a counted skip. Never waits unless it was
told to, and lets nothing out but a programmer's error. Knows no optimizer and no lifecycle.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ema_proto.averages import check_matches
from ema_proto.errors import LocalProtocolError
from ema_proto.messages import Join, Mode
from ema_proto.sender import SenderState
from trainer_client.counters import Counters, Skip
from trainer_client.errors import PlanError, SettingsError
from trainer_client.plan import Plan
from trainer_client.selection import Selection
from trainer_client.settings import Settings, WhenBehind
from trainer_client.staging import CpuStager, Stager
from trainer_client.worker import Worker

log = logging.getLogger("ema")


class Stream:
    """Counts a run's steps and takes its snapshots; owned by the training thread.

    Args:
        worker: has joined the run.
        plan: what it was joined with.
        stager: copies.
        settings: `every`, and whether to wait when behind.
        counters: told of everything.
        steps: optimizer steps already taken.
    """

    def __init__(
        self, worker: Worker, plan: Plan, stager: Stager, settings: Settings, counters: Counters, steps: int
    ) -> None:
        self.steps = steps
        self._worker = worker
        self._plan = plan
        self._stager = stager
        self._every = settings.every
        self._wait_s = settings.wait_timeout_s if settings.when_behind is WhenBehind.WAIT else 0.0
        self._counters = counters
        self._told: set[Skip] = set()

    @classmethod
    def join(cls, worker: Worker, model: nn.Module, settings: Settings, counters: Counters, steps: int) -> Stream:
        """Plan the snapshots of `model` and join the run after `steps` steps.

        Raises:
            PlanError: the model holds something that cannot be streamed.
            JoinError: the server refuses the run, or does not answer.
        """
        plan = Plan.of(model, Selection(settings.include, settings.exclude, settings.trainable_only))
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
            pace=settings.pace,
        )
        # Slots made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            worker.join(join, settings.connect_timeout_s)
        return cls(worker, plan, CpuStager(plan.manifest), settings, counters, steps)

    def advance(self, model: nn.Module, step: int) -> None:
        """The trainer has taken `step` steps: send a snapshot if one is due. The weights are copied on return.

        Raises:
            PlanError: the model's tensors are no longer those that the run was joined with.
        """
        if step <= self.steps:
            self._skip(Skip.REPEATED, f"step {step} is not above {self.steps}; after going back call rewind()")
            return
        self.steps = step
        if step % self._every == 0:
            self._snapshot(model, step)

    def replace(self, model: nn.Module, step: int) -> bool:
        """Have every average become the weights of `model`, as of `step`; whether they were sent. As `advance` else."""
        self.steps = max(step, self.steps)
        return self._snapshot(model, step, "set")

    def _snapshot(self, model: nn.Module, step: int, mode: Mode = "update") -> bool:
        try:
            slot = self._worker.acquire(self._wait_s)
            if slot is None:
                self._skip_none(step)
                return False
            try:
                self._plan = self._plan.renewed(model)
                self._stager.stage(self._plan.tensors(), slot)
            except BaseException:
                self._worker.give_back(slot)
                raise
            self._worker.offer(slot, step, mode)
        except PlanError:
            raise
        # The trainer comes first: whatever else is wrong with a copy for an average is no reason to end a training.
        except Exception as error:  # noqa: BLE001
            self._skip(Skip.ERROR, f"step {step} was not sent, training goes on: {error!r}", error)
            return False
        return True

    def _why_none(self) -> Skip:
        state = self._worker.stats().state
        if state == SenderState.STREAMING.value:
            return Skip.BUSY
        return Skip.STOPPED if state in (SenderState.FAILED.value, SenderState.CLOSED.value) else Skip.OFFLINE

    def _skip_none(self, step: int) -> None:
        reason = self._why_none()
        if reason is Skip.BUSY:
            text = f"step {step} was skipped, the snapshots before it are still on their way"
            self._skip(reason, text + "; when_behind='wait' waits for them, every= sends fewer")
        else:
            self._counters.skipped[reason] += 1  # the connection's thread says what is wrong

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
