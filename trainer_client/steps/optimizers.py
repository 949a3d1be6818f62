"""Finds the optimizer that really steps inside the wrappers put around it, and calls back when it does.

Accelerate and Lightning hand out objects that forward to a torch optimizer; Lookahead and SAM are optimizers that step
another one; and a subclass that does not call `Optimizer.__init__` has a step that torch does not hook.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FrameType, MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_client.errors import SettingsError
from trainer_client.model.sources import storage_address

# Where objects keep the optimizer that they step: those that only forward to it, and those that do more in their step.
_FORWARDING: Final = ("optimizer", "_optimizer")
_STEPPING: Final = ("base_optimizer", "_base_optimizer")

# What torch wraps around the step of every class of optimizers, and calls the hooks from.
_WRAPPER: Final = Optimizer.profile_hook_step(lambda self: None).__code__

_BY_HAND: Final = "call update(model, step) after each step instead of attach()"


class Stepper:
    """One optimizer as attached: the innermost one, and those around it whose step does more. Keeps none alive.

    Raises:
        SettingsError: there is no torch optimizer inside `given`, or none whose steps can be followed.
    """

    def __init__(self, given: object) -> None:
        optimizer, outer = _unwrapped(given)
        if not callable(getattr(optimizer, "step", None)):
            raise SettingsError(f"{_class(optimizer)} has no step(): {_BY_HAND}")
        self._is_hooked = bool(getattr(type(optimizer).step, "hooked", False))
        if self._is_hooked and not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise SettingsError(
                f"{_class(optimizer)} does not call Optimizer.__init__(), so that its step() cannot run: "
                "call super().__init__(params, defaults) in it"
            )
        self.name = _class(given)
        self._inner = weakref.ref(optimizer)
        self._outer = [weakref.ref(each) for each in outer]
        self._depth = 0
        self._stepped = False
        self._is_wrapped_step = False
        self._undo: list[Callable[[], None]] = []

    @property
    def optimizer(self) -> Optimizer | None:
        """The innermost one, while it lives."""
        return self._inner()

    def watch(self, before: Callable[[Optimizer], None], after: Callable[[Stepper], None]) -> None:
        """Call `after(self)` after each real step, and `before` where torch's global hooks do not."""

        def end() -> None:
            if self._depth:
                self._stepped = True  # an outer step goes on, and may write the weights again
            else:
                after(self)

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            if not _is_nested(optimizer):
                untraced(end)()

        @contextmanager
        def step(optimizer: Optimizer) -> Iterator[None]:
            before(optimizer)
            self._is_wrapped_step = True
            try:
                yield
            finally:
                self._is_wrapped_step = False
            end()

        @contextmanager
        def outer_step(outer: Optimizer) -> Iterator[None]:
            before(outer)
            self._depth, self._stepped = self._depth + 1, False
            try:
                yield
            finally:
                self._depth -= 1
            if self._stepped:
                end()

        @contextmanager
        def write(outer: Optimizer) -> Iterator[None]:
            before(outer)
            yield

        optimizer = self._inner()
        if optimizer is not None and self._is_hooked:
            self._undo.append(optimizer.register_step_post_hook(hook).remove)
        elif optimizer is not None:
            self._undo.append(_wrap(optimizer, "step", step))
        for outer in [each for ref in self._outer if (each := ref()) is not None]:
            self._undo.append(_wrap(outer, "step", outer_step))
            for name in ("first_step", "second_step"):  # of SAM: they write the weights outside its step
                if callable(getattr(outer, name, None)):
                    self._undo.append(_wrap(outer, name, write))

    def forget(self) -> None:
        """Stop calling back."""
        while self._undo:
            self._undo.pop()()

    @property
    def is_stepping(self) -> bool:
        """Whether this is called within a step that is not one of torch's, see `is_within_step_of` for those."""
        return self._is_wrapped_step or self._depth > 0

    def is_around(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` is the innermost one, or one that steps it."""
        return any(optimizer is ref() for ref in (self._inner, *self._outer))


def steppers_of(given: object) -> list[Stepper]:
    """The optimizers that `attach` was given, each once; the first one counts steps.

    Raises:
        SettingsError: there is none, or one of them is no torch optimizer or cannot be followed.
    """
    candidates = [given] if isinstance(given, Optimizer) or not isinstance(given, Iterable) else list(given)
    steppers: list[Stepper] = []
    for candidate in candidates:
        stepper = Stepper(candidate)
        if not any(stepper.optimizer is known.optimizer for known in steppers):
            steppers.append(stepper)
    if not steppers:
        raise SettingsError("attach() got an empty list of optimizers: pass the one that steps")
    return steppers


def trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether `optimizer` holds a parameter of `model`, or one that shares memory with it (a flattened one)."""
    parameters = list(model.parameters())
    ids, memory = {id(each) for each in parameters}, {storage_address(each) for each in parameters} - {None}
    return any(id(each) in ids or storage_address(each) in memory for each in parameters_of(optimizer))


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that `optimizer` holds; none if it has no groups of them."""
    return [each for group in getattr(optimizer, "param_groups", ()) for each in group["params"]]


def shapes_of(parameters: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """The shapes of trained parameters, in an order that does not depend on theirs."""
    return sorted(tuple(each.shape) for each in parameters if each.requires_grad)


def untraced(function: Callable[..., None]) -> Callable[..., None]:
    """`function` without compilation: the hooks of a compiled step are traced, and ours would be compiled each time."""
    if torch.compiler.is_compiling():
        disabled: Callable[..., None] = torch.compiler.disable(function)
        return disabled
    return function


def _wrap(
    target: Optimizer, name: str, around: Callable[[Optimizer], AbstractContextManager[None]]
) -> Callable[[], None]:
    """Have each call of the method run within `around(target)`; return a function that takes that back.

    Replaced on the instance, as torch's schedulers do, since other instances of the class are not ours to change.
    """
    original, own = getattr(target, name), vars(target).get(name)
    # Called with the object at hand, so that a deep copy of it steps itself and not the original.
    function = original.__func__ if getattr(original, "__self__", None) is target else None
    reference, active = weakref.ref(target), [True]

    @functools.wraps(original)
    def wrapped(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        call = original if function is None else partial(function, self)
        if not active or self is not reference():
            return call(*args, **kwargs)
        with around(self):
            return call(*args, **kwargs)

    method = MethodType(wrapped, target)  # schedulers that are made later look for its __func__
    setattr(target, name, method)

    def undo() -> None:
        active.clear()
        now = reference()
        if now is None or vars(now).get(name) is not wrapper():
            return  # something wrapped it again, and goes on calling it
        if own is None:
            delattr(now, name)
        else:
            setattr(now, name, own)

    wrapper = weakref.ref(method)
    return undo


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether this is called within two steps of `optimizer`: torch wraps that of its class and the base's."""
    return _stepping().count(optimizer) > 1


def is_within_step_of(optimizers: Container[Optimizer]) -> bool:
    """Whether this is called within a step of one of them."""
    return any(isinstance(stepping, Optimizer) and stepping in optimizers for stepping in _stepping())


def _stepping() -> list[object]:
    """What the steps on the stack belong to, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        # Read defensively: nothing of ours may raise into a step, whatever torch calls its arguments one day.
        if frame.f_code is _WRAPPER and (args := frame.f_locals.get("args", ())):
            found.append(args[0])
        frame = frame.f_back
    return found


def _class(given: object) -> str:
    return type(given).__name__


def _unwrapped(given: object) -> tuple[Optimizer, list[Optimizer]]:
    """The innermost optimizer, and those around it that do more in their step than to call it."""
    chain, outer = [given], list[Optimizer]()
    while (inner := _inner(chain[-1])) is not None and all(inner is not each for each in chain):
        if isinstance(chain[-1], Optimizer) and any(getattr(chain[-1], name, None) is inner for name in _STEPPING):
            outer.append(chain[-1])
        chain.append(inner)
    if any(_class(each).startswith("DeepSpeed") for each in chain):
        raise SettingsError(f"{_class(given)} steps inside its engine, where a snapshot would be torn: {_BY_HAND}")
    if not isinstance(chain[-1], Optimizer):
        raise SettingsError(
            f"{_class(given)} is not a torch.optim.Optimizer and has none inside: pass the optimizer, or {_BY_HAND}"
        )
    return chain[-1], outer


def _inner(given: object) -> object | None:
    """The optimizer that `given` forwards to or steps, if any."""
    for name in (*_FORWARDING, *_STEPPING):
        try:
            inner = getattr(given, name, None)
        except Exception:  # noqa: BLE001, S112
            continue  # a property of the user's that fails is no optimizer
        if isinstance(inner, Optimizer):
            return inner
    return None
