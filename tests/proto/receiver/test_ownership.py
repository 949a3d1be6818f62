"""Ownership of runs: crashed, restarted and competing trainers."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest

from ema_proto import limits
from ema_proto.errors import RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connections
from ema_proto.receiver.gang import Gang
from ema_proto.receiver.machine import Receiver
from ema_proto.receiver.ownership import Ownership
from ema_proto.wire import messages as m
from support.peers import JOIN, OTHER, SESSION, Peer, accept, ends, joined_peer, new_receiver


def test_last_session_is_remembered_for_a_bounded_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ema_proto.receiver.ownership.RUNS_REMEMBERED_MAX", 5)
    ownership = Ownership(Connections(epoch=1, token=None, nonce=str, chunk_bytes=CHUNK_BYTES_MIN), deque())
    for number in range(20):
        ownership.stream(Gang(number, f"run{number}", (SESSION, 0, 1), 0.0, 0.0))

    assert len(ownership._streamed_by) == 5


def test_refused_newcomer_ends_the_session_that_it_replaced() -> None:
    """Otherwise the run would stay in memory as active without a trainer."""
    receiver = new_receiver()
    old = joined_peer(receiver)
    new = Peer(receiver, b"new", OTHER)
    new.say(m.Hello())
    new.say(replace(JOIN, incarnation=1))
    assert old.codes(old.heard()) == [RejectCode.EVICTED]
    event = receiver.events.pop()
    assert isinstance(event, e.JoinRequested)
    receiver.refuse_join(event.run, event.ticket, RejectCode.MANIFEST_CHANGED, "another model")

    assert new.codes(new.heard()) == [RejectCode.MANIFEST_CHANGED]
    assert [(ended.ticket, ended.lost) for ended in ends(receiver)] == [(1, True)]


def test_refused_join_of_a_run_without_a_session_ends_nothing() -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello())
    peer.say(JOIN)
    receiver.events.clear()
    receiver.refuse_join("run", 1, RejectCode.NO_GENERATION, "none")

    assert not receiver.events
    assert peer.codes(peer.heard()) == [RejectCode.NO_GENERATION]


@pytest.mark.parametrize("leaves", [True, False])
def test_leaving_while_the_run_is_loaded_ends_the_session(leaves: bool) -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello())
    peer.say(JOIN)
    if leaves:
        peer.say(m.Bye())
    else:
        receiver.tick(limits.SESSION_LOST_S + 1)

    assert [(ended.ticket, ended.lost) for ended in ends(receiver)] == [(1, not leaves)]
    assert not receiver.accept_join("run", 1, last_step=None, published_step=None, recent=(), continuation="new")


def probed(receiver: Receiver) -> tuple[Peer, Peer]:
    owner = joined_peer(receiver)
    rival = Peer(receiver, b"rival", OTHER)
    rival.say(m.Hello())
    rival.say(JOIN)
    assert owner.heard() == [m.Heartbeat(reply=True)]
    return owner, rival


def test_owner_that_reconnects_while_probed_keeps_the_run() -> None:
    receiver = new_receiver()
    _, rival = probed(receiver)
    again = Peer(receiver, b"again")
    again.say(m.Hello())
    again.say(replace(JOIN, reconnect=True))

    assert rival.codes(rival.heard()) == [RejectCode.RUN_IN_USE]
    receiver.tick(10.0)
    assert not again.heard(), "it keeps the run"


def test_rival_that_reconnects_does_not_wait_longer() -> None:
    receiver = new_receiver()
    owner, _ = probed(receiver)
    again = Peer(receiver, b"again", OTHER)
    again.say(m.Hello(), now=1.9)
    assert not again.say(JOIN, now=1.9)
    receiver.tick(2.0)

    assert owner.codes(owner.heard()) == [RejectCode.EVICTED]
    accept(receiver)
    assert [type(message) for message in again.heard()] == [m.Joined]


def test_higher_incarnation_wins_over_owner_and_rival() -> None:
    receiver = new_receiver()
    owner, rival = probed(receiver)
    third = Peer(receiver, b"third", b"the third session"[:16])
    third.say(m.Hello())
    third.say(replace(JOIN, incarnation=2))
    accept(receiver)
    receiver.tick(10.0)

    assert owner.codes(owner.heard()) == [RejectCode.EVICTED]
    assert rival.codes(rival.heard()) == [RejectCode.RUN_IN_USE]
    assert [type(message) for message in third.heard()] == [m.Joined]


def test_only_a_heartbeat_answers_a_probe() -> None:
    receiver = new_receiver()
    owner, rival = probed(receiver)
    owner.say(m.Begin(1, 1))
    owner.say(m.Heartbeat(reply=True))
    assert not rival.heard()
    rival.say(m.Heartbeat())
    assert not rival.heard(), "a rival cannot answer for the owner"
    owner.say(m.Heartbeat())

    assert rival.codes(rival.heard()) == [RejectCode.RUN_IN_USE]


def test_frames_of_an_older_connection_are_ignored() -> None:
    receiver = new_receiver()
    old = joined_peer(receiver)
    new = joined_peer(receiver, join=replace(JOIN, reconnect=True), name=b"new")

    assert old.codes(old.say(m.Begin(1, 1))) == [RejectCode.UNKNOWN_CONNECTION]
    assert not old.say(m.Bye())
    assert not new.say(m.Begin(1, 1)), "the new connection's run is untouched"


def test_evicted_session_that_reconnects_is_refused() -> None:
    receiver = new_receiver()
    joined_peer(receiver)
    newer = joined_peer(receiver, join=replace(JOIN, incarnation=1), name=b"new", session=OTHER)
    newer.say(m.Bye())
    zombie = Peer(receiver, b"zombie")
    zombie.say(m.Hello())

    assert zombie.codes(zombie.say(replace(JOIN, reconnect=True))) == [RejectCode.EVICTED]


def test_answers_to_an_ended_session_are_ignored() -> None:
    receiver = new_receiver()
    peer = joined_peer(receiver)
    peer.say(m.Begin(1, 1))
    peer.say(m.Chunk(1, 1, 0, CHUNK_BYTES_MIN), payload=bytes(CHUNK_BYTES_MIN))
    peer.say(m.Commit(1, 1, 1, CHUNK_BYTES_MIN))
    newer = joined_peer(receiver, join=replace(JOIN, incarnation=1), name=b"new", session=OTHER)
    for ticket in (1, 99):
        receiver.applied("run", ticket, 0)
        receiver.quarantined("run", ticket, 0, "no")
        receiver.publish_answered("run", ticket, 1, 1)
        receiver.rewound("run", ticket, 1, 1)
        receiver.finished("run", ticket, 1, 1)

    assert not newer.heard()
