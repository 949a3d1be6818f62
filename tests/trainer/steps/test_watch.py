"""Weights that are written while no step is counted are noticed, and nothing else is."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

from trainer_client.steps.watch import Watch


def _write(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_writes_without_steps_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    watch = Watch(list(model.parameters()), steps=7)
    for second in range(1, 30):
        _write(model)
        watch.look(float(second))

    assert ["since step 7" in text for text in _errors(caplog)] == [True]


def test_writes_with_steps_between_them_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    watch = Watch(list(model.parameters()), steps=0)
    for second in range(1, 60):
        _write(model)
        watch.steps += second % 5 == 0
        watch.look(float(second))

    assert _errors(caplog) == []


@pytest.mark.parametrize("writes", [0, 3])
def test_evaluation_that_swaps_weights_a_few_times_is_not_reported(
    writes: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 2)
    watch = Watch(list(model.parameters()), steps=0)
    for second in range(1, 60):
        if second <= writes:
            _write(model)
        watch.look(float(second))

    assert _errors(caplog) == []


def test_calls_within_one_period_count_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    watch = Watch(list(model.parameters()), steps=0)
    for call in range(1, 500):
        _write(model)
        watch.look(5.0 + call / 1000)

    assert _errors(caplog) == []


def test_tensors_are_not_kept_alive() -> None:
    model = nn.Linear(2, 2)
    watch = Watch(list(model.parameters()), steps=0)
    weak = weakref.ref(model.weight)
    del model
    gc.collect()

    watch.look(5.0)
    assert weak() is None
