"""Gangs as the server sees them: ranks that go missing and return, requests of ranks that were away, and bounds."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import pytest

from ema_proto.averages.rules import Ema, Raw
from ema_proto.errors import RejectCode
from ema_proto.limits import (
    CHUNK_BYTES_DEFAULT,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    CREDIT_WINDOW_CHUNKS,
    FINISHED_KEPT_S,
    GANG_WINDOW_BYTES,
    RANKS_MAX,
    RANKS_WAIT_S,
    SERVER_SILENT_S,
    SESSION_LOST_S,
)
from ema_proto.receiver import events as e
from ema_proto.receiver import machine, ownership, streaming
from ema_proto.receiver.machine import Receiver
from ema_proto.wire import messages as m
from ema_proto.wire.boxes import Box
from ema_proto.wire.codec import decode_frames, encode
from ema_proto.wire.manifest import Role, TensorSpec, layout
from support.memory_trainer import shard_manifest, small_join
from support.peers import EPOCH, JOIN, OTHER, Peer, accept, new_receiver

WORLD = 2
ALIVE = m.Heartbeat(reply=True)


def join_of(rank: int) -> m.Join:
    return small_join(shard_manifest(rank, WORLD), rank=rank, world=WORLD, gang="job", checksum=False)


def rank_peer(receiver: Receiver, rank: int, connection: bytes = b"") -> Peer:
    """A greeted connection of a rank; another `connection` name is a later one of the same session."""
    peer = Peer(receiver, b"rank %d" % rank + connection, b"session of rank%d" % rank)
    peer.say(m.Hello())
    return peer


def joined_ranks(receiver: Receiver) -> list[Peer]:
    peers = [rank_peer(receiver, rank) for rank in range(WORLD)]
    for rank, peer in enumerate(peers):
        peer.say(join_of(rank))
    accept(receiver)
    for peer in peers:
        assert any(isinstance(message, m.Joined) for message in peer.heard())
    return peers


def missing(receiver: Receiver) -> list[tuple[int, ...]]:
    """Take the events, and return the missing ranks that they report."""
    found = [event.ranks for event in receiver.events if isinstance(event, e.RanksMissing)]
    receiver.events.clear()
    return found


def test_silent_rank_is_reported_once_and_when_it_is_back() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    ranks[0].say(ALIVE, now=SERVER_SILENT_S + 1)
    receiver.tick(SERVER_SILENT_S + 1)
    assert missing(receiver) == [(1,)]
    receiver.tick(SERVER_SILENT_S + 2)
    assert missing(receiver) == []
    ranks[1].say(ALIVE, now=SERVER_SILENT_S + 3)
    receiver.tick(SERVER_SILENT_S + 3)

    assert missing(receiver) == [()]


def test_rank_that_has_left_is_missing_if_others_go_on() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    ranks[1].say(m.Bye(), now=1.0)
    receiver.tick(2.0)
    assert missing(receiver) == []
    ranks[0].say(ALIVE, now=SERVER_SILENT_S + 2)
    receiver.tick(SERVER_SILENT_S + 2)

    assert missing(receiver) == [(1,)]


def test_no_rank_is_missing_of_a_job_that_ends() -> None:
    receiver = new_receiver()
    for seconds, peer in enumerate(joined_ranks(receiver)):
        peer.say(m.Bye(), now=float(seconds))
        receiver.tick(seconds + 0.5)
    receiver.tick(2 * SERVER_SILENT_S)

    assert missing(receiver) == []


def test_step_that_all_ranks_skip_is_dropped_once() -> None:
    receiver = new_receiver()
    for peer in joined_ranks(receiver):
        peer.say(m.Skip(1, "busy"))
    dropped = [event for event in receiver.events if isinstance(event, e.StepDropped)]

    assert [(event.step, event.rank, event.reason) for event in dropped] == [(1, 0, "skipped")]


def test_step_that_a_rank_has_passed_is_dropped_once_for_it() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    ranks[0].say(m.Begin(2, 1))
    assert ranks[1].codes(ranks[1].say(m.Begin(1, 1))) == [RejectCode.DROPPED]
    assert ranks[1].codes(ranks[1].say(m.Begin(1, 2))) == [RejectCode.DROPPED]
    dropped = [event for event in receiver.events if isinstance(event, e.StepDropped)]

    assert [(event.step, event.rank, event.reason) for event in dropped] == [(1, 0, "passed")]


@pytest.mark.parametrize(("rank", "world"), [(0, RANKS_MAX + 1), (0, 2**32 - 1), (2, 2)])
def test_impossible_ranks_are_refused_at_once(rank: int, world: int) -> None:
    receiver = new_receiver()
    peer = rank_peer(receiver, 0)
    answers = peer.say(replace(join_of(0), rank=rank, world=world))

    assert peer.codes(answers) == [RejectCode.WORLD_UNSUPPORTED]
    assert not receiver.events


def test_rank_that_reconnects_while_probed_has_answered() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    rival = Peer(receiver, b"rival", OTHER)
    rival.say(m.Hello())
    rival.say(replace(join_of(0), gang="another job"))
    ranks[0].say(m.Heartbeat())
    assert rival.heard() == []
    rank_peer(receiver, 1, b" again").say(replace(join_of(1), reconnect=True))

    assert rival.codes(rival.heard()) == [RejectCode.RUN_IN_USE]


def rewind(receiver: Receiver) -> e.RewindRequested:
    """Take the only request for a rewind out of the events."""
    found = [event for event in receiver.events if isinstance(event, e.RewindRequested)]
    receiver.events.clear()
    assert len(found) == 1
    return found[0]


def test_rank_that_reconnects_asks_again_for_a_rewind_that_others_have_not_asked_for() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    ranks[1].say(m.Rewind(1, 0))
    ranks[1] = rank_peer(receiver, 1, b" again")
    ranks[1].say(replace(join_of(1), reconnect=True))
    for request in (1, 2):  # the second shows that nothing is left of the first
        for peer in reversed(ranks):
            peer.say(m.Rewind(request, 0))
        receiver.rewound("run", rewind(receiver).ticket, request, 0)
        for peer in ranks:
            assert [message for message in peer.heard() if isinstance(message, m.Rewound)] == [m.Rewound(request, 0)]
    for peer in ranks:
        assert not peer.codes(peer.say(m.Begin(1, 1)))


def test_rank_that_was_away_during_a_rewind_is_answered_when_it_returns() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    for peer in ranks:
        peer.say(m.Rewind(1, 0))
    event = rewind(receiver)
    ranks[1] = rank_peer(receiver, 1, b" again")
    assert ranks[1].say(replace(join_of(1), reconnect=True)) == []
    receiver.rewound("run", event.ticket, event.request, 0)
    assert [type(message) for message in ranks[1].heard()] == [m.Joined]

    assert ranks[1].say(m.Rewind(1, 0)) == [m.Rewound(1, 0)]
    assert not ranks[1].codes(ranks[1].say(m.Begin(1, 1)))


@pytest.mark.parametrize("has_begun", [True, False])
def test_rank_that_goes_on_after_the_run_is_finished_has_no_slot(has_begun: bool) -> None:
    """The caller frees the slots of a finished run: nothing may be received into them."""
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    if has_begun:
        ranks[1].say(m.Begin(1, 1))
    ranks[0].say(m.Finish(1))
    finish = receiver.events.pop()
    assert isinstance(finish, e.FinishRequested)
    receiver.finished("run", finish.ticket, finish.request, None)
    answers = ranks[1].heard() if has_begun else ranks[1].say(m.Begin(1, 1))
    assert ranks[1].codes(answers) == [RejectCode.DROPPED]
    header, _ = encode(m.Chunk(1, 1, 0, CHUNK_BYTES_MIN), session=ranks[1].session, epoch=ranks[1].epoch)
    assert receiver.header(ranks[1].name, header, 0.0) == e.Discard()

    assert ranks[1].say(m.Finish(1))[-1] == m.Finished(1, None)


def outgoing(receiver: Receiver) -> list[tuple[bytes, m.Message]]:
    """Take all messages out of the outbox, each with the connection that it is for."""
    taken: list[tuple[bytes, m.Message]] = [(peer, decode_frames(frames)[1]) for peer, frames in receiver.outbox]
    receiver.outbox.clear()
    return taken


def finish(receiver: Receiver, lead: Peer, step: int = 7) -> None:
    """The leading rank finishes the run at `step`."""
    lead.say(m.Finish(1))
    event = receiver.events.pop()
    assert isinstance(event, e.FinishRequested)
    receiver.finished("run", event.ticket, event.request, step, warning="short")


def returned(receiver: Receiver, rank: int, now: float, connection: bytes = b" again") -> list[m.Message]:
    """What a rank is answered that joins again on a new connection, and then sends FINISH."""
    peer = rank_peer(receiver, rank, connection)
    peer.say(m.Hello(), now=now)
    answers = peer.say(replace(join_of(rank), reconnect=True), now=now)
    return answers + (peer.say(m.Finish(9), now=now) if answers else [])


@pytest.mark.parametrize("rank", [0, 1], ids=["leading", "other"])
@pytest.mark.parametrize("is_known_to_be_gone", [False, True])
def test_rank_that_was_away_when_the_run_was_finished_gets_the_answer(rank: int, is_known_to_be_gone: bool) -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    if is_known_to_be_gone and rank == 1:
        ranks[1].say(m.Bye())
    finish(receiver, ranks[0])
    for peer in ranks[:rank]:
        assert peer.heard() == [m.Finished(1, 7, warning="short")]
    joined, finished = returned(receiver, rank, now=1.0)

    assert isinstance(joined, m.Joined)
    assert finished == m.Finished(9, 7, warning="short")
    assert not receiver.events, "the averager hears nothing of it"


def test_rank_gets_the_answer_although_another_start_of_the_job_has_the_run() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    finish(receiver, ranks[0])
    for rank in range(WORLD):
        peer = Peer(receiver, b"next %d" % rank, b"session of next%d" % rank)
        peer.say(m.Hello())
        peer.say(replace(join_of(rank), gang="the next job"))
    accept(receiver)
    outgoing(receiver)

    assert returned(receiver, 1, now=1.0)[-1] == m.Finished(9, 7, warning="short")
    assert not receiver.events
    receiver.published("run", 8)
    assert [peer for peer, _ in outgoing(receiver)] == [b"next 0", b"next 1"]


def test_next_client_of_a_rank_is_not_taken_for_one_of_the_finished_gang() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    finish(receiver, ranks[0])
    newer = Peer(receiver, b"newer", b"session of newer")
    newer.say(m.Hello())
    assert newer.say(join_of(0)) == []  # it waits for the other ranks

    assert returned(receiver, 1, now=1.0)[-1] == m.Finished(9, 7, warning="short")
    assert not receiver.events


def test_finished_gang_is_kept_for_a_minute_and_while_it_has_a_rank() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    finish(receiver, ranks[0])
    ranks[1].say(ALIVE, now=FINISHED_KEPT_S)
    receiver.tick(FINISHED_KEPT_S + 1)
    assert isinstance(returned(receiver, 0, now=FINISHED_KEPT_S + 2)[-1], m.Finished)
    assert isinstance(ranks[1].say(m.Finish(1), now=FINISHED_KEPT_S + 3)[-1], m.Finished)
    receiver.tick(FINISHED_KEPT_S + 4)
    assert returned(receiver, 1, now=FINISHED_KEPT_S + 5) == []
    receiver.tick(FINISHED_KEPT_S + 6 + RANKS_WAIT_S)
    (reject,) = [message for _, message in outgoing(receiver) if isinstance(message, m.Reject)]

    assert reject.code is RejectCode.RANKS_MISSING
    assert "ended" in reject.text
    assert "attach" not in reject.text


def test_step_after_the_last_one_of_another_rank_is_dropped_at_once() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    ranks[0].say(m.Begin(1, 1))
    assert ranks[1].say(m.Finish(1)) == []
    (pending,) = ranks[0].heard()
    (later,) = ranks[0].say(m.Begin(2, 2))
    dropped = [event for event in receiver.events if isinstance(event, e.StepDropped)]
    assert isinstance(pending, m.Reject)
    assert isinstance(later, m.Reject)

    assert (pending.code, pending.text) == (RejectCode.DROPPED, "step 1: rank 1 has ended")
    assert (later.code, later.text) == (RejectCode.DROPPED, "step 2: rank 1 has ended")
    assert [(event.step, event.rank, event.reason) for event in dropped] == [(1, 1, "passed"), (2, 1, "passed")]
    receiver.events.clear()
    finish(receiver, ranks[0])
    assert ranks[1].heard() == [m.Finished(1, 7, warning="short")]


def test_ranks_go_on_if_the_run_could_not_be_finished() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    for peer in ranks:
        peer.say(m.Finish(1))
    event = receiver.events.pop()
    assert isinstance(event, e.FinishRequested)
    receiver.finished("run", event.ticket, event.request, None, "the disk is full")
    for peer in ranks:
        assert peer.heard() == [m.Finished(1, None, "the disk is full")]

    for peer in ranks:
        assert peer.say(m.Begin(1, 1)) == []


def test_requests_after_the_run_is_finished_are_answered_at_once() -> None:
    receiver = new_receiver()
    ranks = joined_ranks(receiver)
    finish(receiver, ranks[0])
    (rewound,) = ranks[1].say(m.Rewind(1, 3))
    (published,) = ranks[1].say(m.Publish(2, pin=True))
    (rejected,) = ranks[1].say(m.Begin(8, 1))
    assert isinstance(rewound, m.Rewound)
    assert isinstance(rejected, m.Reject)

    assert rewound.error == "rank 0 has finished run 'run': start the job again to continue it"
    assert published == m.Published(7, 2)
    assert (rejected.code, rejected.text) == (RejectCode.DROPPED, "step 8: rank 0 has finished the run")
    assert not receiver.events
    assert ranks[1].say(m.Finish(3))[-1] == m.Finished(3, 7, warning="short")


def large_join(rank: int, world: int, tensors: int) -> m.Join:
    """The JOIN of one rank of a model of so many sharded tensors."""
    specs = [
        TensorSpec(f"layer.{index}", "F32", (world, 4), Role.PARAM, 0, (), Box((rank, 0), (1, 4)))
        for index in range(tensors)
    ]
    return m.Join(
        run="run", first_step=1, manifest=layout(specs), averages=(Raw(),), rank=rank, world=world, gang="job"
    )


def ask_of_all(receiver: Receiver, world: int, tensors: int) -> list[float]:
    """Have all ranks join; returns the CPU time of the last JOIN, and of each tick until the averager is asked."""
    for rank in range(world):
        message = large_join(rank, world, tensors)
        peer = rank_peer(receiver, rank)
        began = time.thread_time()
        peer.say(message)
        took = [time.thread_time() - began]
    while receiver.has_work:
        assert not receiver.events
        began = time.thread_time()
        receiver.tick(1.0)
        took.append(time.thread_time() - began)
    assert [type(event) for event in receiver.events] == [e.JoinRequested]
    return took


def test_manifests_of_many_ranks_are_merged_in_pieces_between_which_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = {}
    gc.disable()
    try:
        for boxes in (1 << 10, 1 << 40):
            monkeypatch.setattr(ownership, "_MERGED_AT_ONCE", boxes)
            longest[boxes] = max(ask_of_all(new_receiver(), world=40, tensors=150))
    finally:
        gc.enable()

    assert longest[1 << 10] < longest[1 << 40] / 3


def waiting_join(receiver: Receiver) -> Peer:
    """A connection whose JOIN is too large to be read at once."""
    peer = Peer(receiver)
    peer.say(m.Hello())
    tensors = [TensorSpec(f"layer.{index}", "F32", (4,), Role.PARAM, 0) for index in range(1000)]
    assert peer.say(replace(JOIN, manifest=layout(tensors))) == []
    assert receiver.has_work
    assert not receiver.events
    return peer


def test_large_joins_are_read_one_at_a_time_and_other_runs_are_served_in_between() -> None:
    receiver = new_receiver()
    waiting_join(receiver)
    other = Peer(receiver, b"other", OTHER)
    other.say(m.Hello())
    other.say(replace(JOIN, run="other"))
    assert accept(receiver).run == "other"
    assert other.say(m.Begin(1, 1))
    receiver.tick(0.1)

    assert not receiver.has_work
    assert accept(receiver).run == "run"


@pytest.mark.parametrize("ends", ["by BYE", "by a refusal", "because it is forgotten"])
def test_large_join_of_a_connection_that_has_ended_is_not_read(ends: str) -> None:
    receiver = new_receiver()
    peer = waiting_join(receiver)
    if ends == "by BYE":
        peer.say(m.Bye())
    elif ends == "by a refusal":
        peer.send(b"no header", b"")
    receiver.tick(SESSION_LOST_S + 1 if ends == "because it is forgotten" else 0.1)
    receiver.tick(SESSION_LOST_S + 2)

    assert not receiver.has_work
    assert not receiver.events


def test_large_join_that_another_thread_reads_is_taken_afterwards() -> None:
    receiver = new_receiver()
    waiting_join(receiver)
    unread = receiver.take_join()
    assert unread is not None
    assert receiver.take_join() is None
    receiver.tick(0.1)
    assert not receiver.has_work
    assert not receiver.events
    message = unread.read()
    assert not receiver.events, "to read it changes nothing"
    receiver.join_read(unread, message)

    assert accept(receiver).run == "run"


def test_large_join_that_another_thread_finds_wrong_is_refused() -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello())
    tensors = [TensorSpec(f"layer.{index}", "F32", (4,), Role.PARAM, 0) for index in range(1000)]
    rule = Ema(0.9, include=("bias.*",), name="a")
    peer.say(replace(JOIN, manifest=layout(tensors), averages=(rule,)))
    unread = receiver.take_join()
    assert unread is not None
    receiver.join_read(unread, unread.read())

    (refused,) = peer.heard()
    assert isinstance(refused, m.Reject)
    assert refused.code is RejectCode.BAD_AVERAGE
    assert "'bias.*'" in refused.text


@pytest.mark.parametrize("ends", ["by BYE", "by a refusal", "because it is forgotten"])
def test_large_join_of_a_connection_that_ended_while_it_was_read_is_dropped(ends: str) -> None:
    receiver = new_receiver()
    peer = waiting_join(receiver)
    unread = receiver.take_join()
    assert unread is not None
    if ends == "by BYE":
        peer.say(m.Bye())
    elif ends == "by a refusal":
        peer.send(b"no header", b"")
    receiver.tick(SESSION_LOST_S + 1 if ends == "because it is forgotten" else 0.1)
    receiver.join_read(unread, unread.read())

    assert not receiver.events


def test_joins_that_wait_take_a_bounded_amount_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_WAITING_BYTES_MAX", 100_000)
    receiver = new_receiver()
    waiting_join(receiver)
    other = Peer(receiver, b"other", OTHER)
    other.say(m.Hello())
    other.say(replace(large_join(0, 1000, 700), run="other", rank=0, world=1000))
    receiver.tick(0.1)

    assert not receiver.has_work, "the second one was read at once"


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> tuple[Receiver, list[Peer]]:
    """Two ranks have joined, and the work on their manifests has begun."""
    monkeypatch.setattr(ownership, "_MERGED_AT_ONCE", 1)
    receiver = new_receiver()
    ranks = [rank_peer(receiver, rank) for rank in range(WORLD)]
    for rank, peer in enumerate(ranks):
        peer.say(large_join(rank, WORLD, 5))
    receiver.tick(0.1)
    assert receiver.has_work
    assert not receiver.events
    return receiver, ranks


def merge_on(receiver: Receiver) -> None:
    while receiver.has_work:
        receiver.tick(0.2)


def test_other_runs_are_served_while_manifests_are_merged(merging: tuple[Receiver, list[Peer]]) -> None:
    receiver, _ = merging
    other = Peer(receiver, b"other", OTHER)
    other.say(m.Hello())
    other.say(replace(JOIN, run="other"))
    accept(receiver)
    answers = other.heard() + other.say(m.Begin(1, 1))

    assert [type(message) for message in answers] == [m.Joined]
    assert receiver.has_work


def test_rank_that_returns_while_manifests_are_merged_is_merged_as_it_is_then(
    merging: tuple[Receiver, list[Peer]],
) -> None:
    receiver, _ = merging
    rank_peer(receiver, 1, b" again").say(large_join(1, WORLD, 6))
    merge_on(receiver)
    assert not receiver.events
    refused = [message for _, message in outgoing(receiver) if isinstance(message, m.Reject)]

    assert [reject.code for reject in refused] == [RejectCode.NOT_TILED] * WORLD
    assert "'layer.5'" in refused[0].text


def test_rank_that_leaves_while_manifests_are_merged_is_waited_for(merging: tuple[Receiver, list[Peer]]) -> None:
    receiver, ranks = merging
    ranks[1].say(m.Bye())
    merge_on(receiver)
    assert not receiver.events
    rank_peer(receiver, 1, b" again").say(large_join(1, WORLD, 5))
    merge_on(receiver)

    assert [type(event) for event in receiver.events] == [e.JoinRequested]


def test_gang_that_loses_the_run_while_its_manifests_are_merged_asks_for_nothing(
    merging: tuple[Receiver, list[Peer]],
) -> None:
    receiver, _ = merging
    newer = Peer(receiver, b"newer", OTHER)
    newer.say(m.Hello())
    newer.say(replace(JOIN, run="run", incarnation=1))
    merge_on(receiver)

    assert [event.join.incarnation for event in receiver.events if isinstance(event, e.JoinRequested)] == [1]


@pytest.mark.parametrize("ranks", [1, 2, 9, 10, 32, 33, 100, 1000, RANKS_MAX])
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES_MIN, CHUNK_BYTES_DEFAULT, CHUNK_BYTES_MAX])
def test_all_ranks_together_have_a_bounded_number_of_bytes_on_their_way(ranks: int, chunk_bytes: int) -> None:
    window, size = streaming._share(ranks, chunk_bytes)

    assert 2 <= window <= CREDIT_WINDOW_CHUNKS
    assert CHUNK_BYTES_MIN <= size <= chunk_bytes
    assert size % 8 == 0
    if size > CHUNK_BYTES_MIN:
        assert ranks * window * size <= GANG_WINDOW_BYTES
    else:
        assert ranks * window * size <= max(GANG_WINDOW_BYTES, ranks * 2 * CHUNK_BYTES_MIN)


def test_joined_names_the_chunk_size_if_it_is_another_than_in_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "GANG_WINDOW_BYTES", WORLD * 2 * CHUNK_BYTES_MIN)
    for factor in (1, 4):
        receiver = Receiver(epoch=EPOCH, token=None, nonce=lambda: "n", chunk_bytes=factor * CHUNK_BYTES_MIN)
        peers = [rank_peer(receiver, rank) for rank in range(WORLD)]
        for rank, peer in enumerate(peers):
            peer.say(join_of(rank))
        accept(receiver)
        for peer in peers:
            joined = peer.heard()[-1]
            assert isinstance(joined, m.Joined)
            assert joined.chunk_bytes == (None if factor == 1 else CHUNK_BYTES_MIN)
