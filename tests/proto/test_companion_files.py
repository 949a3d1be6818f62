"""Companion files between a sender and a receiver: order, credit, and peers that do not know them."""

from __future__ import annotations

from hashlib import sha256

import pytest

from ema_proto.errors import RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN, CREDIT_WINDOW_CHUNKS
from ema_proto.receiver import events as e
from ema_proto.sender import events as se
from ema_proto.sender.events import SenderState
from ema_proto.sender.file_queue import FilePayload
from ema_proto.sender.machine import Sender
from ema_proto.wire import messages as m
from ema_proto.wire.files import FileSpec
from support.memory_trainer import small_join, small_manifest
from support.pair import World
from support.peers import EPOCH, SESSION, Peer, drain, give, new_receiver

TOKENIZER = bytes(range(256)) * 2048  # eight chunks
SPEC = FileSpec("tokenizer.json", len(TOKENIZER), sha256(TOKENIZER).hexdigest())


def sender_with(files: tuple[FileSpec, ...] | None, capabilities: tuple[str, ...] = ("crc32", "files")) -> Sender:
    sender = Sender(SESSION, token=None, jitter=lambda: 0.0, capabilities=capabilities)
    sender.opened(0.0)
    sender.join(small_join(small_manifest(1), files=files))
    drain(sender)
    return sender


@pytest.mark.parametrize("own", [("crc32",), ("crc32", "files")])
@pytest.mark.parametrize("servers", [("crc32",), ("crc32", "files"), ("crc32", "files", "later")])
def test_files_are_announced_only_where_both_sides_support_them(own: tuple[str, ...], servers: tuple[str, ...]) -> None:
    sender = sender_with((SPEC,), own)
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, servers))

    (join,) = drain(sender)
    both = "files" in own and "files" in servers

    assert isinstance(join, m.Join)
    assert join.files == ((SPEC,) if both else None)
    greeted = next(event for event in sender.events if isinstance(event, se.Greeted))
    assert ("files" in greeted.capabilities) == both


def test_welcome_lists_files_only_for_a_trainer_that_does() -> None:
    old, new = Peer(new_receiver()), Peer(new_receiver())

    assert old.say(m.Hello()) == [m.Welcome(EPOCH, CHUNK_BYTES_MIN)]
    assert new.say(m.Hello(capabilities=("files",))) == [m.Welcome(EPOCH, CHUNK_BYTES_MIN, ("crc32", "files"))]


def test_every_part_of_a_file_goes_before_the_snapshot() -> None:
    sender = sender_with((SPEC,))
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, ("crc32", "files")))
    drain(sender)
    give(sender, m.Joined(None, None, (), "new", 3, missing_files=(SPEC.sha256,)))
    sender.offer(0, 1, 0.0)

    first = [sender.next_frame() for _ in range(3)]

    assert [out.payload for out in first if out is not None] == [
        FilePayload(0, place * CHUNK_BYTES_MIN, CHUNK_BYTES_MIN) for place in range(3)
    ]
    assert sender.next_frame() is None, "no credit"
    give(sender, m.Credit(8))
    rest = [sender.next_frame() for _ in range(5)]
    assert all(out is not None and isinstance(out.payload, FilePayload) for out in rest)
    assert sender.next_frame() is None, "a snapshot needs credit of its own"
    give(sender, m.Credit(9))
    assert isinstance(drain(sender)[0], m.Begin)


def test_a_server_that_asks_for_an_unknown_file_is_left() -> None:
    sender = sender_with((SPEC,))
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, ("crc32", "files")))
    give(sender, m.Joined(None, None, (), "new", 3, missing_files=("0" * 64,)))

    assert sender.state is SenderState.DISCONNECTED


def test_a_file_that_gets_no_credit_is_a_stall() -> None:
    sender = sender_with((SPEC,))
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN, ("crc32", "files")))
    give(sender, m.Joined(None, None, (), "new", 1, missing_files=(SPEC.sha256,)))
    for second in range(1, 40):
        give(sender, m.Heartbeat(), now=float(second))
        sender.tick(float(second))

    assert sender.state is SenderState.DISCONNECTED


def test_receiver_holds_at_most_a_window_of_parts_until_they_are_stored() -> None:
    large = FileSpec("large", 20 * CHUNK_BYTES_MIN, "0" * 64)
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello(capabilities=("files",)))
    peer.say(small_join(small_manifest(1), files=(large,), checksum=False))
    asked = receiver.events.pop()
    assert isinstance(asked, e.JoinRequested)
    receiver.accept_join(
        "run",
        asked.ticket,
        last_step=None,
        published_step=None,
        recent=(),
        continuation="new",
        missing_files=("0" * 64,),
    )
    (joined,) = peer.heard()
    assert isinstance(joined, m.Joined)
    assert joined.credit == CREDIT_WINDOW_CHUNKS
    for place in range(CREDIT_WINDOW_CHUNKS):
        part = m.File(0, place * CHUNK_BYTES_MIN, CHUNK_BYTES_MIN)
        assert not peer.say(part, payload=bytes(CHUNK_BYTES_MIN)), "nothing is stored yet"

    receiver.file_stored("run", asked.ticket)

    assert peer.heard() == [m.Credit(CREDIT_WINDOW_CHUNKS + 1)]


@pytest.mark.parametrize("payload", [bytes(4), b"", bytes(CHUNK_BYTES_MIN + 1)])
def test_a_part_of_another_length_is_refused(payload: bytes) -> None:
    receiver = new_receiver()
    peer = Peer(receiver)
    peer.say(m.Hello(capabilities=("files",)))
    peer.say(small_join(small_manifest(1), files=(SPEC,), checksum=False))
    asked = receiver.events.pop()
    assert isinstance(asked, e.JoinRequested)
    receiver.accept_join(
        "run",
        asked.ticket,
        last_step=None,
        published_step=None,
        recent=(),
        continuation="new",
        missing_files=(SPEC.sha256,),
    )
    peer.heard()

    assert peer.codes(peer.say(m.File(0, 0, CHUNK_BYTES_MIN), payload=payload)) == [RejectCode.BAD_MESSAGE]


def test_a_file_that_fails_ends_the_session_and_is_sent_again() -> None:
    world = World()
    world.server.damages = True
    trainer = world.trainer(files={"tokenizer.json": TOKENIZER})
    world.run(10)
    trainer.train(world.now)
    world.calm()

    assert world.server.files == {SPEC.sha256: TOKENIZER}
    assert trainer.committed == {1}


def test_files_are_sent_to_a_server_that_lost_them_with_the_restart() -> None:
    world = World()
    trainer = world.trainer(files={"tokenizer.json": TOKENIZER})
    world.run(10)
    world.server.restart()
    world.server.files.clear()
    trainer.train(world.now)
    world.calm()

    assert world.server.files == {SPEC.sha256: TOKENIZER}
    assert trainer.committed == {1}
