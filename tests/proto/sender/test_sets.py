"""A `set` stands for the weights after a step that may have been applied already, and survives a lost connection."""

from __future__ import annotations

import pytest

from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.wire import messages as m
from support.peers import done, drain, give, rejoin, sender_in


def test_set_may_repeat_the_last_step_and_update_may_not() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 3, 0.0)
    sender.offer(1, 3, 0.0, "set")
    with pytest.raises(LocalProtocolError, match="step 3 is not after step 3"):
        sender.offer(2, 3, 0.0)
    with pytest.raises(LocalProtocolError, match="step 2 is not after step 3"):
        sender.offer(2, 2, 0.0, "set")


def test_run_may_begin_with_a_set_of_step_0() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 0, 0.0, "set")
    sender.offer(1, 1, 0.0)

    assert [type(message).__name__ for message in drain(sender)] == ["Begin", "Commit", "Begin", "Commit"]


def test_set_of_the_last_applied_step_is_sent_again_after_reconnect() -> None:
    """It is unknown whether the step was applied as an update or as this set, and a repeated set has no effect."""
    sender = sender_in("streaming")
    sender.offer(0, 3, 0.0)
    drain(sender)
    give(sender, m.Committed(3, 1))
    sender.events.clear()
    sender.offer(0, 3, 0.0, "set")
    drain(sender)
    sent = rejoin(sender, m.Joined(3, None, (3,), "continued", 8))

    (join,) = (message for message in sent if isinstance(message, m.Join))
    assert join.first_step == 4, "a set of step 3 says that 3 steps are taken"
    assert not done(sender)
    (begin, _) = drain(sender)
    assert isinstance(begin, m.Begin)
    assert (begin.step, begin.mode) == (3, "set")


@pytest.mark.parametrize(("recent", "code"), [((3, 4), None), ((4,), RejectCode.STEP_PASSED)])
def test_set_before_an_applied_step_is_settled_like_an_update(recent: tuple[int, ...], code: RejectCode | None) -> None:
    sender = sender_in("streaming")
    sender.offer(0, 3, 0.0, "set")
    sender.offer(1, 4, 0.0)
    drain(sender)
    rejoin(sender, m.Joined(4, None, recent, "continued", 8))

    assert [(event.slot, event.code) for event in done(sender)] == [(0, code), (1, None)]
