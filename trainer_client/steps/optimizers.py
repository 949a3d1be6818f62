"""Finds the optimizer that really steps inside the wrappers put around it, and calls back when it does.

Accelerate and Lightning hand out objects that forward to a torch optimizer. Lookahead, SAM and wrappers for half
precision step another optimizer and write the weights before or after that. So a step counts when the innermost
optimizer has stepped, and its snapshot is due when the outermost call around that has returned.
"""

from __future__ import annotations

import functools
import inspect
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

# Where wrappers keep the optimizer that they step. Not `optim`: torch's ZeroRedundancyOptimizer replaces what it keeps
# there, and is followed by its own step.
_INNER: Final = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "base", "original_optimizer")

# Methods that write the weights, besides `step`: of SAM, of optimizers that evaluate other weights than they train
# (schedule-free), and of Lookahead.
_WRITING: Final = ("first_step", "second_step", "train", "eval", "backup_and_load_cache", "clear_and_load_backup")

# Wrappers that write nothing themselves: their methods call those of the optimizer inside, some of the time.
_FORWARDING: Final = ("AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer")

# Step inside backward(): their step() is missing or does nothing.
_IN_BACKWARD: Final = ("Lomo", "AdaLomo", "LOMO", "AdaLOMO")
# Their step() writes shards of the weights, which are gathered later.
_DEEPSPEED: Final = ("DeepSpeedEngine", "DeepSpeedOptimizer", "DeepSpeedOptimizerWrapper")

# What torch wraps around the step of every class of optimizers, and calls the hooks from.
_WRAPPER: Final = Optimizer.profile_hook_step(lambda self: None).__code__

_BY_HAND: Final = "call update(model, step) after each step instead of attach()"


class Stepper:
    """One optimizer as attached: the innermost one, and the wrappers around it. Keeps none alive.

    Attributes:
        name: the class of what was given.
        wrappers: how many there are around the innermost one.
        has_modes: it evaluates other weights than it trains (schedule-free).

    Raises:
        SettingsError: there is no torch optimizer inside `given`, or none whose steps can be followed.
    """

    def __init__(self, given: object) -> None:
        chain = _unwrapped(given)
        optimizer = chain[-1]
        assert isinstance(optimizer, Optimizer)
        self._is_hooked = bool(getattr(type(optimizer).step, "hooked", False))
        if self._is_hooked and not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise SettingsError(
                f"{_class(optimizer)} does not call Optimizer.__init__(), so that its step() cannot run: "
                "call super().__init__(params, defaults) in it"
            )
        self.name = _class(given)
        self.wrappers = len(chain) - 1
        self.has_modes = any(_has_modes(each) for each in chain)
        self._inner = weakref.ref(optimizer)
        self._references = [_reference(each) for each in chain]
        self._depth = 0
        self._stepped = False
        self._undo: list[Callable[[], None]] = []

    @property
    def optimizer(self) -> Optimizer | None:
        """The innermost one, while it lives."""
        return self._inner()

    def watch(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call `after` after each real step, and `before` where torch's global hooks do not see a write coming."""

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            if not _is_nested(optimizer):
                untraced(stepped)()

        def stepped() -> None:
            if self._depth:
                self._stepped = True  # a call around it goes on, and may write the weights again
            else:
                after()

        @contextmanager
        def call(*, is_step: bool = False, writes: bool = True) -> Iterator[None]:
            if writes:
                before()
            if not self._depth:
                self._stepped = False  # of a call that failed
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            if is_step or self._stepped:
                self._stepped = False
                stepped()

        optimizer = self._inner()
        if optimizer is not None and self._is_hooked:
            self._undo.append(optimizer.register_step_post_hook(hook).remove)
        elif optimizer is not None:
            self._undo.append(_wrap(optimizer, "step", partial(call, is_step=True)))
        for each in self._chain():
            if each is not optimizer:
                self._undo.append(_wrap(each, "step", partial(call, writes=not _forwards(each))))
            for name in () if _forwards(each) else _WRITING:
                if callable(_attribute(each, name)):
                    self._undo.append(_wrap(each, name, call))

    def forget(self) -> None:
        """Stop calling back."""
        while self._undo:
            self._undo.pop()()

    def _chain(self) -> list[object]:
        """The wrappers and the innermost optimizer, as far as they live."""
        return [each for reference in self._references if (each := reference()) is not None]

    @property
    def is_stepping(self) -> bool:
        """Whether this is called within a step that is not one of torch's, see `is_within_step_of` for those."""
        return self._depth > 0

    def is_around(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` is the innermost one, or one that steps it."""
        return any(optimizer is each for each in self._chain())


def steppers_of(given: object) -> list[Stepper]:
    """The optimizers that `attach` was given, each once; the first one counts steps.

    Raises:
        SettingsError: there is none, or one of them is no torch optimizer or cannot be followed.
    """
    candidates = [given] if isinstance(given, Optimizer) or not isinstance(given, Iterable) else list(given)
    steppers: list[Stepper] = []
    for each in [each for candidate in candidates for each in _parts(candidate)]:
        stepper = Stepper(each)
        same = [index for index, known in enumerate(steppers) if known.optimizer is stepper.optimizer]
        if not same:
            steppers.append(stepper)
        elif stepper.wrappers > steppers[same[0]].wrappers:
            steppers[same[0]] = stepper  # the outer one may write the weights after the one inside
    if not steppers:
        raise SettingsError("attach() got an empty list of optimizers: pass the one that steps")
    return steppers


def _parts(given: object) -> list[object]:
    """The optimizers of the single parameters where `given` only keeps them, and they step in backward(); else `given`.

    So do `LayerWiseDummyOptimizer` of transformers and `OptimizerInBackwardWrapper` of torchtune.
    """
    inner = _inner(given)
    for name in ("optimizer_dict", "optim_map"):
        table = _attribute(given if inner is None else inner, name)
        if isinstance(table, dict) and table:
            return list(table.values())
    return [given]


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


def _wrap(target: object, name: str, around: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """Have each call of the method run within `around()`; return a function that takes that back.

    Replaced on the instance, as torch's schedulers do, since other instances of the class are not ours to change.
    """
    original, own = getattr(target, name), vars(target).get(name)
    # Called with the object at hand, so that a deep copy of it steps itself and not the original.
    function = original.__func__ if getattr(original, "__self__", None) is target else None
    reference, active = weakref.ref(target), [True]

    @functools.wraps(original)
    def wrapped(self: object, *args: Any, **kwargs: Any) -> Any:
        call = original if function is None else partial(function, self)
        if not active or self is not reference():
            return call(*args, **kwargs)
        with around():
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


def _reference(wrapper: object) -> weakref.ref[object]:
    try:
        vars(wrapper)  # its methods are replaced there
        return weakref.ref(wrapper)
    except TypeError:
        raise SettingsError(
            f"{_class(wrapper)} has __slots__, so that its step() cannot be followed: "
            f"pass the optimizer inside if it only forwards to that, or {_BY_HAND}"
        ) from None


def _forwards(wrapper: object) -> bool:
    return any(kind.__name__ in _FORWARDING for kind in type(wrapper).__mro__)


def _has_modes(given: object) -> bool:
    """Whether it evaluates other weights than it trains, and swaps them in `train()` and `eval()`."""
    groups = _attribute(given, "param_groups")
    return _attribute(given, "train_mode") is not None or bool(groups and "train_mode" in groups[0])


def _unwrapped(given: object) -> list[object]:
    """The wrappers, the outermost first, and the innermost optimizer."""
    chain = [given]
    while (inner := _inner(chain[-1])) is not None and all(inner is not each for each in chain):
        chain.append(inner)
    for each in chain:
        _check(each)
    innermost = chain[-1]
    if not isinstance(innermost, Optimizer):
        raise SettingsError(
            f"{_class(given)} is not a torch.optim.Optimizer and has none inside: pass the optimizer, or {_BY_HAND}"
        )
    if inspect.unwrap(type(innermost).step) is inspect.unwrap(Optimizer.step):
        raise SettingsError(f"{_class(innermost)} has no step() of its own: {_BY_HAND}")
    return chain


def _check(given: object) -> None:
    """Refuse what cannot be followed, by name."""
    kinds = type(given).__mro__
    if any(kind.__name__ in _DEEPSPEED or kind.__module__.startswith("deepspeed.runtime") for kind in kinds):
        raise SettingsError(
            f"{_class(given)} steps inside DeepSpeed's engine, where a snapshot would be torn: {_BY_HAND}, "
            "with engine.module as the model and engine.global_steps as the step"
        )
    if any(kind.__name__ in _IN_BACKWARD for kind in kinds):
        raise SettingsError(f"{_class(given)} steps inside backward(), and not in step(): {_BY_HAND}")
    if _attribute(given, "_overlap_with_ddp") is True:
        raise SettingsError(f"{_class(given)} with overlap_with_ddp=True steps inside backward(): {_BY_HAND}")


def _inner(given: object) -> Optimizer | None:
    """The optimizer that `given` steps, if any."""
    return next((each for name in _INNER if isinstance(each := _attribute(given, name), Optimizer)), None)


def _attribute(given: object, name: str) -> Any:
    try:
        return getattr(given, name, None)
    except Exception:  # noqa: BLE001
        return None  # a property of the user's that fails holds no optimizer
