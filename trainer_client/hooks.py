"""Being called after every real optimizer step, and before any.

Comes in: optimizers and functions. Goes out: calls of these, until removed. Knows no model and no snapshot.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from trainer_client.errors import SettingsError

# What torch wraps around the step of every class of optimizers, and calls the hooks from.
_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__

_dead: list[RemovableHandle] = []  # of objects that are gone; their hooks do nothing


class Attachment:
    """Calls `after_step` after each step of the first optimizer, until `remove()`; of no optimizer, never.

    A step that a gradient scaler skips never reaches the optimizer, so it is not counted.

    Args:
        optimizers: the first one's steps count.
        after_step: is called when it has stepped.
        before_step: a method, called before *every* optimizer of the process steps, since any may hold the model's
            parameters. Its object is not kept alive by that.
        when_removed: is called by `remove()`, before the hooks go.
    """

    def __init__(
        self,
        optimizers: tuple[Optimizer, ...] = (),
        after_step: Callable[[], None] = lambda: None,
        before_step: Callable[[Optimizer], None] | None = None,
        when_removed: Callable[[], None] = lambda: None,
    ) -> None:
        def stepped(optimizer: Optimizer) -> None:
            if not _is_nested(optimizer):
                after_step()

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            _untraced(stepped)(optimizer)

        self._when_removed = when_removed
        self._handles = [optimizer.register_step_post_hook(after) for optimizer in optimizers[:1]]
        if before_step is not None:
            self._handles.append(_before_any(before_step))

    @property
    def attached(self) -> bool:
        """Whether steps still arrive."""
        return bool(self._handles)

    def remove(self) -> None:
        """Stop; calling it again changes nothing."""
        if self._handles:
            self._when_removed()
        while self._handles:
            self._handles.pop().remove()
        _remove_dead()


def _before_any(before_step: Callable[[Optimizer], None]) -> RemovableHandle:
    """Hook `before_step` to all optimizers, for as long as its object lives."""

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        method = weak()
        if method is not None:
            _untraced(method)(optimizer)

    _remove_dead()
    handle: RemovableHandle = register_optimizer_step_pre_hook(hook)
    # Not removed there: garbage is collected at any moment, also while torch goes through the hooks.
    weak = weakref.WeakMethod(before_step, lambda _: _dead.append(handle))
    return handle


def _remove_dead() -> None:
    while _dead:
        _dead.pop().remove()


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether this is called within two steps of `optimizer`: torch wraps that of its class and the base's."""
    frame: FrameType | None = sys._getframe()
    steps = 0
    while frame is not None and steps < 2:
        # Looked up with care: nothing of ours may raise into a step, whatever torch calls its arguments one day.
        if frame.f_code is _WRAPPER and frame.f_locals.get("args", ())[:1] == (optimizer,):
            steps += 1
        frame = frame.f_back
    return steps == 2


def _untraced(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, left alone by a compiler: a compiled step has its hooks traced, and ours compiled anew each time."""
    if torch.compiler.is_compiling():
        disabled: Callable[..., None] = torch.compiler.disable(function)
        return disabled
    return function


def check_optimizers(given: object) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; the first one's steps are the run's.

    Raises:
        SettingsError: there is none, or one of them is no torch optimizer.
    """
    candidates = tuple(given) if isinstance(given, Iterable) else (given,)
    if not candidates:
        raise SettingsError("attach() got an empty list of optimizers: pass the one that steps")
    optimizers: list[Optimizer] = []
    for optimizer in candidates:
        if not isinstance(optimizer, Optimizer):
            raise SettingsError(
                f"{type(optimizer).__name__} is not a torch.optim.Optimizer: "
                "pass the optimizer inside it, or call update(model, step) after each step"
            )
        optimizers.append(optimizer)
    return tuple(optimizers)
