"""PUBLISH, REWIND and FINISH: their order among the snapshots, and their answers."""

from __future__ import annotations

import pytest

from ema_proto import limits
from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN
from ema_proto.sender import events as e
from ema_proto.sender.events import SenderState
from ema_proto.wire import messages as m
from support.peers import EPOCH, alive, answered, done, drain, give, kinds, rejoin, sender_in


def test_requests_wait_for_answers_to_earlier_snapshots() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    sender.request_publish(pin=False)
    assert kinds(sender) == ["Begin", "Commit"]
    give(sender, m.Committed(1, 1))

    assert kinds(sender) == ["Publish"]


def test_nothing_is_written_before_rewind_or_finish_is_answered() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 5, 0.0)
    drain(sender)
    give(sender, m.Committed(5, 1))
    number = sender.request_rewind(3)
    sender.offer(0, 4, 0.0)
    assert kinds(sender) == ["Rewind"]
    give(sender, m.Rewound(number, 3))
    assert kinds(sender) == ["Begin", "Commit"]
    give(sender, m.Committed(4, 2))
    sender.request_finish()
    sender.request_publish(pin=False)
    assert kinds(sender) == ["Finish"]
    give(sender, m.Finished(2, None, "disk full"))

    assert kinds(sender) == ["Publish"]


def test_refused_rewind_drops_snapshots_below_the_last_step() -> None:
    """The run is still at step 5: a new step 4 or 5 would be confused with the old one."""
    sender = sender_in("streaming")
    sender.offer(0, 5, 0.0)
    drain(sender)
    give(sender, m.Committed(5, 1))
    sender.events.clear()
    number = sender.request_rewind(3)
    sender.offer(0, 4, 0.0)
    sender.offer(1, 6, 0.0)
    drain(sender)
    give(sender, m.Rewound(number, None, "no such generation"))

    assert [(item.step, item.code) for item in done(sender)] == [(4, RejectCode.STEP_PASSED)]
    assert answered(sender) == [e.Answered(number, None, "no such generation")]
    assert kinds(sender) == ["Begin", "Commit"]


def test_steps_continue_after_a_refused_rewind() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 5, 0.0)
    drain(sender)
    first, second = sender.request_rewind(3), sender.request_rewind(2)
    give(sender, m.Committed(5, 1))
    drain(sender)
    give(sender, m.Rewound(first, None, "no"))
    drain(sender)
    give(sender, m.Rewound(second, None, "no"))

    with pytest.raises(LocalProtocolError, match="step 4 is not after step 5"):
        sender.offer(0, 4, 0.0)
    sender.offer(0, 6, 0.0)


def test_rewind_with_a_lost_answer_is_sent_again_first() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 5, 0.0)
    drain(sender)
    give(sender, m.Committed(5, 1))
    sender.request_rewind(3)
    sender.offer(0, 4, 0.0)
    drain(sender)
    rejoin(sender, m.Joined(3, 3, (2, 3), "continued", 8))

    assert kinds(sender) == ["Rewind"]


def test_slow_rewind_does_not_end_the_connection() -> None:
    sender = sender_in("streaming")
    sender.request_rewind(0)
    sender.offer(0, 1, 0.0)
    alive(sender, limits.REQUEST_S - 1)

    assert sender.state is SenderState.STREAMING


def test_request_with_a_lost_answer_is_sent_again_after_reconnect() -> None:
    sender = sender_in("streaming")
    sender.request_publish(pin=True)
    drain(sender)
    for step in range(1, 400):
        sender.offer(0, step, float(step))
        drain(sender)
        give(sender, m.Committed(step, step), now=float(step))
        give(sender, m.Credit(step + 8), now=float(step))
        sender.tick(float(step))
        if sender.state is SenderState.DISCONNECTED:
            break
    sender.opened(400.0)
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN), now=400.0)
    give(sender, m.Joined(step, None, (step,), "continued", 8), now=400.0)

    assert m.Publish(1, pin=True) in drain(sender)
