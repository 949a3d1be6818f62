"""Hooks on optimizers: calls back after each real step of a model, and when the snapshot of one is due."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from trainer_client.steps.optimizers import Stepper, is_within_step_of, parameters_of, shapes_of, trains, untraced
from trainer_client.steps.rounds import PATIENCE, Rounds

log = logging.getLogger("ema")

_dead: list[RemovableHandle] = []  # hooks of collected objects, which do nothing


_FOLLOWED_SHOWN = 3
_COPY_STEPS = 16  # in a row; fewer may be an interlude


class _Kind(Enum):
    """What an optimizer that was not given trains."""

    OURS = auto()
    COPY = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class Listener:
    """What an attachment calls, always in the training thread.

    Attributes:
        count: so many steps were taken.
        take: the snapshot of the last counted step is due.
        before_write: an optimizer is about to write its parameters; None: a wrapper may write any.
        when_removed: the attachment is being removed.
    """

    count: Callable[[int], None] = lambda steps: None
    take: Callable[[], None] = lambda: None
    before_write: Callable[[Optimizer | None], None] = lambda optimizer: None
    when_removed: Callable[[], None] = lambda: None


class Attachment:
    """Follows the optimizers of a model until `remove()`.

    A step that a gradient scaler skips never reaches the optimizer, so it is not counted. An optimizer that holds
    parameters of the model and was not given is followed too, once it steps; the log says so.

    Args:
        model: what is trained.
        steppers: the optimizers; the first one's steps are counted. None: nothing is ever called.
        listener: is called. The optimizers keep it alive, this process's hooks do not.

    Attributes:
        model: what is trained; an empty module if None was given.
    """

    def __init__(
        self, model: nn.Module | None = None, steppers: Sequence[Stepper] = (), listener: Listener | None = None
    ) -> None:
        self.model = nn.Module() if model is None else model
        self._listener = Listener() if listener is None else listener
        self._rounds = Rounds(0)
        self._steppers: list[Stepper] = []
        self._members: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._given = len(steppers)
        self._followed = 0
        self._uncounted = 0  # steps of others since the counter's last one, or the last snapshot
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[int, _Kind]] = weakref.WeakKeyDictionary()
        self._copy_steps = 0  # steps of a copy of the model since the last one of the model
        self._thread: int | None = None  # that of the steps
        self._handles: list[RemovableHandle] = []
        _remove_dead()
        if steppers:
            self._handles = [
                _hook_all(register_optimizer_step_pre_hook, self._before),
                _hook_all(register_optimizer_step_post_hook, self._after_any),
            ]
            for stepper in steppers:
                self._add(stepper)
            if model is not None and not any(trains(each, model) for each in self._members):
                text = "ema: %s holds no parameter of the model, which is right only if it steps copies of them"
                log.warning(text, " and ".join(stepper.name for stepper in steppers))
            for stepper in steppers:
                if stepper.has_modes:
                    log.warning(
                        "ema: %s evaluates other weights than it trains; the ones it trains are streamed. To stream "
                        "the others, call update(model, step) between its eval() and train() instead of attach()",
                        stepper.name,
                    )

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def remove(self) -> None:
        """Stop; calling it again changes nothing."""
        if self._handles:
            self.settle()
            self._listener.when_removed()
        while self._handles:
            self._handles.pop().remove()
        for stepper in self._steppers:
            stepper.forget()
        _remove_dead()

    def when_stepped_later(self, warn: Callable[[], None]) -> None:
        """Have `warn` called once, if one of the optimizers steps after this."""
        called = False

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            nonlocal called
            if not called:
                called = True  # the hook stays: torch iterates over the hooks while it calls them
                warn()

        for optimizer in tuple(self._members):
            if hasattr(optimizer, "_optimizer_step_post_hooks"):
                optimizer.register_step_post_hook(hook)

    def settle(self) -> None:
        """Take the snapshot of the last step now, if it waits for optimizers that may not step again."""
        rounds = self._rounds
        is_followed = rounds.current is not None and rounds.current >= self._given
        is_idle = rounds.counter not in rounds.stepped or self._is_counter_gone()
        if self._uncounted and not rounds.pending and (is_followed or is_idle):
            self._count_by(rounds.current or 0)
            rounds.pending = True
        if self._rounds.pending:
            self._take()
        # Reported only when the client is used: one that a script has dropped also sees the steps of later models.
        if self._copy_steps >= _COPY_STEPS:
            self._copy_steps = 0
            log.error(
                "ema: a copy of the attached model is trained, and not the model itself, whose last step is "
                "the last one sent: call remove() on what attach() returned, and attach the copy and its optimizer"
            )

    def _add(self, stepper: Stepper) -> int:
        """Follow an optimizer, in the place of one that is gone where there is one."""
        gone = [index for index, each in enumerate(self._steppers) if each.optimizer is None]
        index = gone[0] if gone else len(self._steppers)
        self._steppers[index : index + 1] = [stepper]
        self._rounds.members = len(self._steppers)
        if stepper.optimizer is not None:
            self._members[stepper.optimizer] = index
        stepper.watch(partial(self._before_member, index), partial(self._after, index))
        return index

    def _before(self, optimizer: Optimizer) -> None:
        member = self._members.get(optimizer)
        if member is not None:
            self._before_member(member, optimizer)
        else:
            self._listener.before_write(optimizer)

    def _before_member(self, member: int, optimizer: Optimizer | None = None) -> None:
        if self._rounds.before(member):
            self._take()
        self._listener.before_write(optimizer)

    def _after(self, member: int) -> None:
        self._copy_steps, self._thread = 0, threading.get_ident()
        if member == self._rounds.counter:
            self._uncounted = 0
            self._listener.count(1)
        else:
            self._uncounted += 1
            others = max(1, len(self._steppers) - 1)
            if self._is_counter_gone() or self._uncounted > PATIENCE * others:
                self._count_by(member)
        if self._rounds.after(member):
            self._take()

    def _take(self) -> None:
        self._rounds.pending = False
        self._uncounted = 0
        self._listener.take()

    def _is_counter_gone(self) -> bool:
        return self._steppers[self._rounds.counter].optimizer is None

    def _count_by(self, member: int) -> None:
        """Count the steps of another optimizer from now on: the one that counted them does not step any longer."""
        before, now = self._steppers[self._rounds.counter].name, self._steppers[member].name
        log.error("ema: steps are now counted by %s, since %s, which counted them before, does not step", now, before)
        self._rounds.counter = member
        self._listener.count(self._uncounted)
        self._uncounted = 0

    def _after_any(self, optimizer: Optimizer) -> None:
        """Some optimizer of this process has stepped: follow it if it trains the model and was not given."""
        if optimizer in self._members or any(stepper.is_around(optimizer) for stepper in self._steppers):
            return
        if self._thread not in (None, threading.get_ident()):
            return  # a snapshot is taken by the thread that trains
        try:
            kind = self._kind_of(optimizer)
            self._copy_steps += kind is _Kind.COPY
            if kind is not _Kind.OURS:
                return
            stepper = Stepper(optimizer)
        except Exception as error:  # noqa: BLE001  an optimizer of an unknown kind is no reason to end a training
            self._known[optimizer] = (_groups(optimizer), _Kind.OTHER)
            log.warning("ema: the steps of %s cannot be followed: %r", type(optimizer).__name__, error)
            return
        if self._followed < _FOLLOWED_SHOWN:  # some loops make an optimizer in each of their rounds
            log.error(
                "ema: the model is trained by %s, which attach() was not given; its steps are followed from now on: "
                "pass every optimizer of the model, attach(model, [first, second])",
                stepper.name,
            )
        self._followed += 1
        self._after(self._add(stepper))

    def _kind_of(self, optimizer: Optimizer) -> _Kind:
        groups = _groups(optimizer)
        seen, kind = self._known.get(optimizer, (0, _Kind.OTHER))
        if seen != groups:
            if any(stepper.is_stepping for stepper in self._steppers) or is_within_step_of(self._members):
                kind = _Kind.OTHER  # its step is part of another's
            elif trains(optimizer, self.model):
                kind = _Kind.OURS
            else:
                is_copy = shapes_of(parameters_of(optimizer)) == shapes_of(self.model.parameters())
                kind = _Kind.COPY if is_copy else _Kind.OTHER
            self._known[optimizer] = (groups, kind)
        return kind


def _groups(optimizer: Optimizer) -> int:
    return len(getattr(optimizer, "param_groups", ()))


def _hook_all(register: Callable[[Any], RemovableHandle], method: Callable[[Optimizer], None]) -> RemovableHandle:
    """Have torch call `method` for every optimizer of the process, for as long as its object lives."""

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        alive = weak()
        if alive is not None:
            untraced(alive)(optimizer)

    handle = register(hook)
    # Not removed there: garbage is collected at any moment, also while torch iterates over the hooks.
    weak = weakref.WeakMethod(method, lambda _: _dead.append(handle))
    return handle


def _remove_dead() -> None:
    while _dead:
        _dead.pop().remove()
