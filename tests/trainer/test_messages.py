"""What the log says when a run is joined, when it is over, and after that."""

from __future__ import annotations

import logging

import pytest
from torch import nn
from torch.optim import SGD

from ema_proto.wire.messages import Continuation, Joined
from support.fake_worker import OfflineClient
from trainer_client.messages import log_joined

_ENDPOINT = "tcp://127.0.0.1:1"


def _joined(continuation: Continuation, last_step: int | None) -> Joined:
    return Joined(last_step, last_step, (), continuation, credit=8)


@pytest.mark.parametrize(
    ("continuation", "last_step", "text"),
    [
        ("rewound", 184, "the averages went back to step 184, and the 116 steps between them are a gap"),
        ("continued", 184, "the averages are at step 184, and the 116 steps between them are a gap"),
    ],
)
def test_resume_that_loses_steps_gives_a_warning(
    caplog: pytest.LogCaptureFixture, continuation: Continuation, last_step: int, text: str
) -> None:
    log_joined("noc2", _joined(continuation, last_step), 300, 300)

    assert caplog.messages == [f"ema: run noc2 continues at step 300; {text}"]


@pytest.mark.parametrize(("continuation", "last_step"), [("new", None), ("continued", 300), ("rewound", 298)])
def test_resume_that_loses_no_due_step_gives_no_warning(
    caplog: pytest.LogCaptureFixture, continuation: Continuation, last_step: int | None
) -> None:
    caplog.set_level(logging.WARNING)
    log_joined("noc2", _joined(continuation, last_step), 300, 298)

    assert caplog.messages == []


def test_earlier_run_of_the_name_gives_a_warning_that_says_how_to_continue_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    joined = Joined(None, None, (), "new", credit=8, set_aside="noc2.20260101T000000Z")
    log_joined("noc2", joined, 0, 0)

    assert "kept as noc2.20260101T000000Z (to continue a run, resume the training from its checkpoint" in caplog.text


def test_steps_after_finish_give_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    client = OfflineClient(_ENDPOINT, run="r")
    client.attach(model, optimizer)
    optimizer.step()
    assert client.finish()
    assert caplog.messages == []

    optimizer.step()
    optimizer.step()
    assert caplog.messages == ["ema: steps after finish() are neither counted nor sent (run r)"]


def test_optimizer_of_the_next_run_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    first = OfflineClient(_ENDPOINT, run="first")
    first.attach(model, optimizer)
    optimizer.step()
    assert first.finish()
    second = OfflineClient(_ENDPOINT, run="second")
    second.attach(model, optimizer)
    optimizer.step()

    assert second.steps == 1
    assert caplog.messages == []
    second.close()
