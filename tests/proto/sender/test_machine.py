"""The sender against faulty, slow and lost servers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ema_proto import limits
from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN
from ema_proto.sender import events as e
from ema_proto.sender.events import SenderState
from ema_proto.sender.machine import Sender
from ema_proto.wire import messages as m
from support.peers import EPOCH, JOIN, SESSION, alive, answered, done, drain, give, kinds, rejoin, sender_in


def test_frames_of_another_session_or_server_start_are_ignored() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    assert kinds(sender) == ["Begin", "Commit"]
    give(sender, m.Committed(1, 1), session=b"another session.")
    give(sender, m.Committed(1, 1), epoch=EPOCH + 1)
    assert not done(sender)
    give(sender, m.Committed(1, 1))

    assert done(sender) == [e.SnapshotDone(0, 1)]


def test_reject_without_the_session_is_accepted() -> None:
    sender = sender_in("streaming")
    give(sender, m.Reject(RejectCode.STALE_EPOCH, "restarted"), session=bytes(16), epoch=EPOCH + 1)

    assert sender.state is SenderState.DISCONNECTED


@pytest.mark.parametrize("code", [RejectCode.STALE_EPOCH, RejectCode.UNKNOWN_CONNECTION])
def test_server_restart_between_welcome_and_join_loses_only_the_connection(code: RejectCode) -> None:
    sender = sender_in("joining")
    give(sender, m.Reject(code, "who are you"))

    assert sender.state is SenderState.DISCONNECTED


def test_answer_to_an_unsent_snapshot_ends_the_connection_and_keeps_the_slot() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    sender.next_frame()
    give(sender, m.Committed(1, 1))

    assert sender.state is SenderState.DISCONNECTED
    assert not done(sender)


def test_answers_to_unknown_snapshots_and_requests_change_nothing() -> None:
    sender = sender_in("streaming")
    give(sender, m.Committed(9, 9))
    give(sender, m.Reject(RejectCode.BAD_CHUNK, "no", 9, 9))
    give(sender, m.Rewound(9, 9))
    give(sender, m.Finished(9, 9))

    assert sender.state is SenderState.STREAMING
    assert not done(sender)
    assert not answered(sender)


def test_unrelated_finished_does_not_close_the_session() -> None:
    sender = sender_in("streaming")
    sender.request_finish()
    give(sender, m.Finished(1, 1))

    assert sender.state is SenderState.STREAMING, "FINISH was not even written"


def test_unsupported_version_of_the_server_is_final() -> None:
    sender = sender_in("greeting")
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, major=2))

    assert sender.state is SenderState.FAILED


def test_uncheckable_checksum_is_refused_not_dropped() -> None:
    sender = sender_in("greeting")
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, capabilities=()))
    sender.join(replace(JOIN, checksum=True))

    refused = sender.events[-1]
    assert isinstance(refused, e.Refused)
    assert "CRC-32" in refused.text


def test_reconnect_joins_with_the_next_step_and_never_rewinds() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 5, 0.0)
    (join,) = (message for message in rejoin(sender, m.Joined(None, None, (), "new", 8)) if isinstance(message, m.Join))

    assert (join.reconnect, join.first_step) == (True, 5)


@pytest.mark.parametrize(
    ("joined", "left", "dropped"),
    [
        (m.Joined(2, None, (1, 2), "continued", 8), [], []),
        (m.Joined(2, None, (2,), "continued", 8), [], [(1, RejectCode.STEP_PASSED)]),
        (m.Joined(1, None, (1,), "continued", 8), [2], []),
        (m.Joined(None, None, (), "new", 8), [1, 2], []),
    ],
)
def test_joined_settles_every_unanswered_snapshot(
    joined: m.Joined, left: list[int], dropped: list[tuple[int, RejectCode]]
) -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    sender.offer(1, 2, 0.0)
    drain(sender)
    rejoin(sender, joined)

    assert [(item.step, item.code) for item in done(sender) if item.code] == dropped
    assert [message.step for message in drain(sender) if isinstance(message, m.Begin)] == left


def _lost_at(sender: Sender) -> float:
    """When the sender connects again."""
    lost = [event for event in sender.events if isinstance(event, e.ConnectionLost)]
    return lost[-1].retry_at


def _refused_while_streaming(sender: Sender) -> None:
    sender.events.clear()
    give(sender, m.Reject(RejectCode.UNAVAILABLE, "an internal error"))


def test_run_that_fails_is_joined_again_later_each_time_and_then_given_up() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    pauses = []
    for _ in range(limits.REJOINS_MAX):
        drain(sender)
        _refused_while_streaming(sender)
        pauses.append(_lost_at(sender))
        rejoin(sender, m.Joined(None, None, (), "new", 8))
    assert not done(sender)
    _refused_while_streaming(sender)

    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0]  # without jitter
    assert sender.state is SenderState.FAILED
    assert [event.code for event in sender.events if isinstance(event, e.Refused)] == [RejectCode.UNAVAILABLE]
    assert [item.step for item in done(sender)] == [1]


def test_applied_snapshot_ends_the_row_of_failures() -> None:
    sender = sender_in("streaming")
    for step in range(1, 3 * limits.REJOINS_MAX):
        _refused_while_streaming(sender)
        assert _lost_at(sender) == 0.0
        rejoin(sender, m.Joined(None, None, (), "new", 8))
        sender.offer(0, step, 0.0)
        attempts = [message.attempt for message in drain(sender) if isinstance(message, m.Begin)]
        give(sender, m.Committed(step, attempts[-1]))

    assert sender.state is SenderState.STREAMING


def test_run_that_cannot_be_joined_for_now_is_asked_for_without_end() -> None:
    sender = sender_in("streaming")
    _refused_while_streaming(sender)
    for _ in range(20):
        sender.opened(0.0)
        give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN))
        assert sender.state is SenderState.JOINING
        _refused_while_streaming(sender)

    assert sender.state is SenderState.DISCONNECTED
    assert _lost_at(sender) == limits.REJOIN_PAUSE_MAX_S


def test_snapshot_is_dropped_after_three_failures() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    for attempt in range(1, limits.ATTEMPTS_MAX + 1):
        assert not done(sender)
        drain(sender)
        give(sender, m.Credit(100))
        give(sender, m.Reject(RejectCode.CHECKSUM, "bits", 1, attempt))

    assert done(sender) == [e.SnapshotDone(0, 1, RejectCode.CHECKSUM, "bits")]


def test_no_chunk_beyond_credit_and_no_begin_without_credit() -> None:
    sender = sender_in("joining")
    give(sender, m.Joined(None, None, (), "new", 0))
    sender.offer(0, 1, 0.0)
    assert sender.next_frame() is None
    give(sender, m.Credit(1))
    frames = [sender.next_frame() for _ in range(4)]

    assert [frame is not None and frame.payload is not None for frame in frames] == [False, True, False, False]
    assert frames[3] is None


def test_credit_never_falls() -> None:
    sender = sender_in("streaming")
    give(sender, m.Credit(1))
    for step in range(1, 9):
        sender.offer(0, step, 0.0)
        assert kinds(sender) == ["Begin", "Commit"]
        give(sender, m.Committed(step, step))


def test_silence_before_or_after_welcome_ends_the_connection() -> None:
    greeting, streaming = sender_in("greeting"), sender_in("streaming")
    for sender in (greeting, streaming):
        sender.tick(limits.HANDSHAKE_S + 0.1)
    assert [greeting.state, streaming.state] == [SenderState.DISCONNECTED, SenderState.STREAMING]
    streaming.tick(limits.SERVER_SILENT_S + 0.1)

    assert streaming.state is SenderState.DISCONNECTED


def test_unanswered_snapshot_ends_the_connection() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    alive(sender, limits.STALL_S + 2)

    assert sender.state is SenderState.DISCONNECTED


@pytest.mark.parametrize("state", ["greeting", "greeted", "joining", "streaming"])
def test_closed_session_returns_every_slot_and_sends_bye(state: str) -> None:
    sender = sender_in(state)
    if state in ("joining", "streaming"):
        sender.offer(0, 1, 0.0)
        sender.request_publish(pin=False)
    sender.bye()

    said = kinds(sender)
    assert said == (["Bye"] if state in ("joining", "streaming") else [])
    assert len(done(sender)) == len(answered(sender)) == len(said)
    sender.join(JOIN) if state in ("greeting", "greeted") else None
    sender.offer(0, 2, 0.0)
    assert done(sender)[-1].code is RejectCode.UNAVAILABLE


def test_heartbeats_do_not_pile_up_while_writes_block() -> None:
    sender = sender_in("streaming")
    for tenth in range(600):
        sender.tick(tenth / 10)

    assert len(drain(sender)) <= limits.SERVER_SILENT_S / limits.HEARTBEAT_S


def test_second_join_or_transport_is_a_local_error() -> None:
    sender = sender_in("streaming")
    with pytest.raises(LocalProtocolError, match="has joined run 'run' already"):
        sender.join(JOIN)
    with pytest.raises(LocalProtocolError, match="opened while streaming"):
        sender.opened(0.0)
    with pytest.raises(LocalProtocolError, match="before the run was joined"):
        Sender(SESSION, token=None, jitter=lambda: 0.0).offer(0, 1, 0.0)
