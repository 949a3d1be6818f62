"""The receiver against faulty, hostile and interrupted peers."""

from __future__ import annotations

import pytest

from ema_proto import limits
from ema_proto.auth import prove
from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.receiver import connections
from ema_proto.receiver import events as e
from ema_proto.wire import messages as m
from support.peers import JOIN, OTHER, SESSION, Peer, accept, ends, joined_peer, new_receiver


def test_second_session_on_a_connection_is_refused() -> None:
    receiver = new_receiver()
    peer = joined_peer(receiver)
    peer.session = OTHER

    assert peer.codes(peer.say(m.Hello())) == [RejectCode.BAD_MESSAGE]
    assert not peer.say(m.Begin(1, 1))
    assert not receiver.events


def test_session_of_zeros_is_refused() -> None:
    peer = Peer(new_receiver(), session=bytes(16))

    assert peer.codes(peer.say(m.Hello())) == [RejectCode.BAD_MESSAGE]


def test_repeated_hello_gets_the_same_answer() -> None:
    receiver = new_receiver()
    peer = joined_peer(receiver)
    assert [type(answer) for answer in peer.say(m.Hello())] == [m.Welcome]

    assert not peer.say(m.Begin(1, 1)), "still joined"


def test_repeated_challenge_asks_for_one_proof() -> None:
    peer = Peer(new_receiver(token="secret"))
    challenges = peer.say(m.Hello()) + peer.say(m.Hello())
    assert challenges == [m.Challenge("nonce 0")] * 2
    proof = prove("secret", nonce="nonce 0", session=SESSION)

    for _ in range(2):
        assert [type(answer) for answer in peer.say(m.Hello(proof=proof))] == [m.Welcome]


def test_nonce_is_valid_for_one_proof() -> None:
    peer = Peer(new_receiver(token="secret"))
    peer.say(m.Hello())
    assert peer.codes(peer.say(m.Hello(proof="0" * 64))) == [RejectCode.UNAUTHORIZED]
    late = prove("secret", nonce="nonce 0", session=SESSION)

    assert peer.say(m.Hello(proof=late)) == [m.Challenge("nonce 1")]


def test_proof_of_another_connection_is_refused() -> None:
    receiver = new_receiver(token="secret")
    first, second = Peer(receiver, b"first"), Peer(receiver, b"second")
    first.say(m.Hello())
    second.say(m.Hello())
    proof = prove("secret", nonce="nonce 0", session=SESSION)

    assert second.codes(second.say(m.Hello(proof=proof))) == [RejectCode.UNAUTHORIZED]


def test_only_hello_bodies_are_read_before_the_proof() -> None:
    receiver = new_receiver(token="secret")
    peer = Peer(receiver)
    peer.say(m.Hello())

    assert peer.codes(peer.say(JOIN)) == [RejectCode.UNKNOWN_CONNECTION]
    assert not receiver.events


def test_frames_without_hello_are_answered_once_and_counted() -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    answers = [answer for _ in range(100) for answer in peer.say(m.Heartbeat(reply=True))]

    assert peer.codes(answers) == [RejectCode.UNKNOWN_CONNECTION]
    assert receiver.rejects[RejectCode.UNKNOWN_CONNECTION] == 100


def test_second_join_on_a_connection_is_refused_without_an_event() -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello())
    codes = [code for _ in range(10) for code in peer.codes(peer.say(JOIN))]

    assert codes == [RejectCode.BAD_MESSAGE]
    assert [type(event) for event in receiver.events] == [e.JoinRequested]


def test_body_without_its_header_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError):
        new_receiver().control(b"{}")


def test_connections_without_a_run_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 10)
    receiver = new_receiver()
    owner = joined_peer(receiver)
    strangers = [Peer(receiver, f"stranger {number}".encode()) for number in range(100)]
    for stranger in strangers:
        stranger.say(m.Hello())

    assert not owner.say(m.Begin(1, 1)), "still joined"
    assert strangers[-1].say(m.Heartbeat(reply=True)) == [m.Heartbeat()]
    assert strangers[50].codes(strangers[50].say(m.Heartbeat(reply=True))) == [RejectCode.UNKNOWN_CONNECTION]


def test_silent_connections_are_forgotten() -> None:
    receiver = new_receiver()
    peers = [Peer(receiver, str(number).encode()) for number in range(50)]
    for number, peer in enumerate(peers):
        peer.say(m.Hello(), now=float(number))
    receiver.tick(25.5 + limits.SESSION_LOST_S)

    for number, peer in enumerate(peers):
        known = not peer.codes(peer.say(m.Heartbeat(reply=True), now=100.0))
        assert known == (number > 25)


def test_joined_lists_at_most_recent_steps() -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello())
    peer.say(JOIN)
    accept(receiver, last_step=100, recent=tuple(range(1, 101)))

    (joined,) = peer.heard()
    assert isinstance(joined, m.Joined)
    assert joined.recent == tuple(range(93, 101))


def test_long_server_text_is_truncated() -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello())
    peer.say(JOIN)
    receiver.refuse_join("run", 1, RejectCode.MANIFEST_CHANGED, "x" * 1_000_000)

    assert peer.codes(peer.heard()) == [RejectCode.MANIFEST_CHANGED]


def test_connection_is_counted_once_when_greeted() -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(JOIN)
    assert receiver.greeted == 0

    peer.say(m.Hello())
    peer.say(m.Hello())
    assert receiver.greeted == 1


def test_requests_after_finish_are_refused_except_bye() -> None:
    receiver = new_receiver()
    peer = joined_peer(receiver)
    peer.say(m.Finish(1))

    assert not peer.codes(peer.say(m.Bye()))
    assert [ended.lost for ended in ends(receiver)] == [False]


def test_failed_finish_lets_the_session_go_on() -> None:
    receiver = new_receiver()
    peer = joined_peer(receiver)
    peer.say(m.Finish(1))
    receiver.finished("run", 1, 1, None, "disk full")

    assert peer.heard() == [m.Finished(1, None, "disk full")]
    assert not peer.say(m.Begin(1, 1))
