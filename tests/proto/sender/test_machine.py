"""The trainer's end against servers that are wrong, slow or gone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ema_proto import limits
from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN
from ema_proto.sender import events as e
from ema_proto.sender.machine import Sender, SenderState
from ema_proto.wire import messages as m
from support.peers import EPOCH, JOIN, SESSION, alive, answered, done, drain, give, kinds, rejoin, sender_in


def test_frames_of_another_session_or_server_start_are_not_taken() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    assert kinds(sender) == ["Begin", "Commit"]
    give(sender, m.Committed(1, 1), session=b"another session.")
    give(sender, m.Committed(1, 1), epoch=EPOCH + 1)
    assert not done(sender)
    give(sender, m.Committed(1, 1))

    assert done(sender) == [e.SnapshotDone(0, 1)]


def test_a_reject_is_taken_from_a_server_that_does_not_know_the_session() -> None:
    sender = sender_in("streaming")
    give(sender, m.Reject(RejectCode.STALE_EPOCH, "restarted"), session=bytes(16), epoch=EPOCH + 1)

    assert sender.state is SenderState.DISCONNECTED


@pytest.mark.parametrize("code", [RejectCode.STALE_EPOCH, RejectCode.UNKNOWN_CONNECTION])
def test_a_server_that_restarts_between_welcome_and_join_costs_a_connection_not_the_run(code: RejectCode) -> None:
    sender = sender_in("joining")
    give(sender, m.Reject(code, "who are you"))

    assert sender.state is SenderState.DISCONNECTED


def test_an_answer_to_what_was_not_sent_yet_ends_the_connection_and_keeps_the_slot() -> None:
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


def test_a_finished_that_answers_nothing_of_ours_does_not_close_the_session() -> None:
    sender = sender_in("streaming")
    sender.request_finish()
    give(sender, m.Finished(1, 1))

    assert sender.state is SenderState.STREAMING, "FINISH was not even written"


def test_a_server_that_chooses_a_version_we_do_not_speak_is_final() -> None:
    sender = sender_in("greeting")
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, major=2))

    assert sender.state is SenderState.FAILED


def test_a_checksum_that_the_server_cannot_check_is_refused_not_dropped() -> None:
    sender = sender_in("greeting")
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, capabilities=()))
    sender.join(replace(JOIN, checksum=True))

    refused = sender.events[-1]
    assert isinstance(refused, e.Refused)
    assert "CRC-32" in refused.text


def test_a_fresh_connection_asks_for_the_run_with_the_next_step_and_never_rewinds() -> None:
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


def test_a_snapshot_that_fails_three_times_is_dropped() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    for attempt in range(1, limits.ATTEMPTS_MAX + 1):
        assert not done(sender)
        drain(sender)
        give(sender, m.Credit(100))
        give(sender, m.Reject(RejectCode.CHECKSUM, "bits", 1, attempt))

    assert done(sender) == [e.SnapshotDone(0, 1, RejectCode.CHECKSUM, "bits")]


def test_no_chunk_goes_beyond_credit_and_no_begin_without_any() -> None:
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


def test_silence_before_welcome_and_after_it_costs_the_connection() -> None:
    greeting, streaming = sender_in("greeting"), sender_in("streaming")
    for sender in (greeting, streaming):
        sender.tick(limits.HANDSHAKE_S + 0.1)
    assert [greeting.state, streaming.state] == [SenderState.DISCONNECTED, SenderState.STREAMING]
    streaming.tick(limits.SERVER_SILENT_S + 0.1)

    assert streaming.state is SenderState.DISCONNECTED


def test_a_snapshot_that_is_not_answered_costs_the_connection_although_the_server_lives() -> None:
    sender = sender_in("streaming")
    sender.offer(0, 1, 0.0)
    alive(sender, limits.STALL_S + 2)

    assert sender.state is SenderState.DISCONNECTED


@pytest.mark.parametrize("state", ["greeting", "greeted", "joining", "streaming"])
def test_a_closed_session_gives_everything_back_and_says_goodbye_where_it_asked_for_a_run(state: str) -> None:
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


def test_heartbeats_do_not_pile_up_while_nothing_can_be_written() -> None:
    sender = sender_in("streaming")
    for tenth in range(600):
        sender.tick(tenth / 10)

    assert len(drain(sender)) <= limits.SERVER_SILENT_S / limits.HEARTBEAT_S


def test_a_second_join_or_transport_is_the_callers_fault() -> None:
    sender = sender_in("streaming")
    with pytest.raises(LocalProtocolError, match="has joined run 'run' already"):
        sender.join(JOIN)
    with pytest.raises(LocalProtocolError, match="opened while streaming"):
        sender.opened(0.0)
    with pytest.raises(LocalProtocolError, match="before the run was joined"):
        Sender(SESSION, token=None, jitter=lambda: 0.0).offer(0, 1, 0.0)
