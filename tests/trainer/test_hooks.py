"""Which steps are counted, and what is left in torch of an object that was told of them and is gone."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from trainer_client.hooks import Attachment


def _parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    return parameter


class _Dressed(Adam):
    """Steps by the step of its base, which torch wraps as well once there is a plain `Adam` in the process."""

    broken = False

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        if self.broken:
            raise RuntimeError("after the inner step")


class _Listener:
    """Is told of steps; may have garbage collected just then."""

    def __init__(self, *, collects: bool = False) -> None:
        self.attachment = Attachment()
        self.collects = collects
        self.told: list[Optimizer] = []

    def before(self, optimizer: Optimizer) -> None:
        self.told.append(optimizer)
        if self.collects:
            gc.collect()

    def attach(self, optimizer: Optimizer) -> None:
        """In a circle, as a session and its attachment are: only the collector ends it."""
        self.attachment = Attachment((optimizer,), before_step=self.before, when_removed=self.nothing)

    def nothing(self) -> None:
        """When removed."""


def test_a_step_that_calls_the_step_of_its_base_is_one_step() -> None:
    Adam([_parameter()])
    optimizer, steps = _Dressed([_parameter()]), list[int]()
    attachment = Attachment((optimizer,), lambda: steps.append(len(steps) + 1))

    optimizer.step()
    optimizer.step()

    assert steps == [1, 2]
    attachment.remove()


def test_a_step_that_fails_after_that_of_its_base_is_none_and_the_next_one_is() -> None:
    Adam([_parameter()])
    optimizer, steps = _Dressed([_parameter()]), list[str]()
    attachment = Attachment((optimizer,), lambda: steps.append("step"))

    optimizer.broken = True
    with contextlib.suppress(RuntimeError):
        optimizer.step()
    assert steps == []
    optimizer.broken = False
    optimizer.step()

    assert steps == ["step"]
    attachment.remove()


def test_an_optimizer_that_another_one_steps_is_counted() -> None:
    inner, steps = SGD([_parameter()], lr=0.1), list[str]()

    class Outer(SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            inner.step()

    attachment = Attachment((inner,), lambda: steps.append("step"))

    Outer([_parameter()], lr=0.1).step()

    assert steps == ["step"]
    attachment.remove()


@pytest.mark.parametrize("order", ["the forgotten one first", "the forgotten one last"])
def test_what_is_collected_during_a_step_does_not_disturb_it(order: str) -> None:
    optimizer, collecting, last = SGD([_parameter()], lr=0.1), _Listener(collects=True), _Listener()

    def forgotten() -> None:
        _Listener().attach(SGD([_parameter()], lr=0.1))

    gc.disable()
    try:
        if order.endswith("first"):
            forgotten()
        collecting.attach(optimizer)
        if order.endswith("last"):
            forgotten()
        last.attach(optimizer)
        optimizer.step()
    finally:
        gc.enable()

    assert last.told == [optimizer]
    collecting.attachment.remove()
    last.attachment.remove()


def test_the_hook_of_what_was_forgotten_goes_with_the_next_attachment() -> None:
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
