"""Which optimizer steps are counted, and that hooks of a collected object are removed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from trainer_client.steps.hooks import Attachment, Listener
from trainer_client.steps.optimizers import steppers_of


def _parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    return parameter


def _attached(optimizer: Optimizer, take: Callable[[], None]) -> Attachment:
    return Attachment(None, steppers_of(optimizer), Listener(take=take))


class _Derived(Adam):
    """Its step calls the base's, which torch also wraps once the process has made a plain `Adam`."""

    broken = False

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        if self.broken:
            raise RuntimeError("after the inner step")


class _Listener:
    """Records steps; may collect garbage during one."""

    def __init__(self, *, collects: bool = False) -> None:
        self.attachment = Attachment()
        self.collects = collects
        self.seen: list[Optimizer | None] = []

    def before(self, optimizer: Optimizer | None) -> None:
        self.seen.append(optimizer)
        if self.collects:
            gc.collect()

    def attach(self, optimizer: Optimizer) -> None:
        """Makes a reference cycle, as a session and its attachment are: only the collector frees it."""
        listener = Listener(before_write=self.before, when_removed=self.nothing)
        self.attachment = Attachment(None, steppers_of(optimizer), listener)

    def nothing(self) -> None:
        """When removed."""


def test_step_that_calls_the_base_step_counts_once() -> None:
    Adam([_parameter()])
    optimizer, steps = _Derived([_parameter()]), list[int]()
    attachment = _attached(optimizer, lambda: steps.append(len(steps) + 1))

    optimizer.step()
    optimizer.step()

    assert steps == [1, 2]
    attachment.remove()


def test_step_that_raises_after_the_base_step_is_not_counted() -> None:
    Adam([_parameter()])
    optimizer, steps = _Derived([_parameter()]), list[str]()
    attachment = _attached(optimizer, lambda: steps.append("step"))

    optimizer.broken = True
    with contextlib.suppress(RuntimeError):
        optimizer.step()
    assert steps == []
    optimizer.broken = False
    optimizer.step()

    assert steps == ["step"]
    attachment.remove()


def test_optimizer_stepped_by_another_is_counted() -> None:
    inner, steps = SGD([_parameter()], lr=0.1), list[str]()

    class Outer(SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            inner.step()

    attachment = _attached(inner, lambda: steps.append("step"))

    Outer([_parameter()], lr=0.1).step()

    assert steps == ["step"]
    attachment.remove()


@pytest.mark.parametrize("order", ["collected one first", "collected one last"])
def test_garbage_collection_during_a_step_does_not_disturb_it(order: str) -> None:
    optimizer, collecting, last = SGD([_parameter()], lr=0.1), _Listener(collects=True), _Listener()

    def drop() -> None:
        _Listener().attach(SGD([_parameter()], lr=0.1))

    gc.disable()
    try:
        if order.endswith("first"):
            drop()
        collecting.attach(optimizer)
        if order.endswith("last"):
            drop()
        last.attach(optimizer)
        optimizer.step()
    finally:
        gc.enable()

    assert last.seen == [optimizer]
    collecting.attachment.remove()
    last.attachment.remove()


def test_hook_of_a_collected_object_is_removed_by_the_next_attach() -> None:
    gc.collect()
    Attachment().remove()
    hooks = len(_global_optimizer_pre_hooks)
    _Listener().attach(SGD([_parameter()], lr=0.1))
    gc.collect()

    listener = _Listener()
    listener.attach(SGD([_parameter()], lr=0.1))

    assert len(_global_optimizer_pre_hooks) == hooks + 1
    listener.attachment.remove()
    assert len(_global_optimizer_pre_hooks) == hooks
