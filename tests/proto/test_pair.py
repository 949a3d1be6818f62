"""Sender and receiver against each other, with and without faults."""

from __future__ import annotations

import pytest

from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.sender.events import SenderState
from support.pair import Server, Trainer, World, check_agreement


def test_snapshots_arrive_byte_equal_and_in_order() -> None:
    world = World()
    trainer = world.trainer()
    for _ in range(60):
        trainer.train(world.now)
        world.turn()
    world.calm()

    assert trainer.step > 20
    assert trainer.committed == set(trainer.sent)
    assert dict(world.server.applied) == trainer.sent


@pytest.mark.parametrize("chunks", [1 / 65536, 0.5, 1.0, 1.0001, 8.0, 30.0])
def test_any_size_passes_the_credit_window(chunks: float) -> None:
    world = World()
    trainer = world.trainer(chunks=chunks)
    for _ in range(30):
        trainer.train(world.now)
        world.turn()
    world.calm()

    assert trainer.step > 5
    assert dict(world.server.applied) == trainer.sent


def test_credit_never_exceeds_free_staging() -> None:
    world = World()
    trainer = world.trainer(chunks=3)
    world.turn()
    world.turn()
    trainer.train(world.now)
    trainer.train(world.now)
    server = world.server

    server.work = server.receiver.events.clear  # type: ignore[method-assign]
    trainer.free.append(2)
    trainer.slots.append(b"")
    trainer.train(world.now)
    world.run(20)

    assert trainer.sender.next_frame() is None, "two snapshots are held: the third has to wait"
    assert not trainer.committed


def test_reconnect_resends_unanswered_snapshots() -> None:
    world = World()
    trainer = world.trainer()
    world.turn()
    world.turn()
    trainer.train(world.now)
    trainer.write()
    assert trainer.connection is not None
    trainer.connection.up.pop()
    trainer.sender.lost(world.now, "cut")
    trainer.settle()
    world.calm()

    assert trainer.committed == {1}
    assert dict(world.server.applied) == trainer.sent


def test_commit_with_a_lost_answer_is_applied_once() -> None:
    world = World()
    trainer = world.trainer()
    world.turn()
    world.turn()
    trainer.train(world.now)
    trainer.write()
    assert trainer.connection is not None
    for frames in list(trainer.connection.up):
        world.server.take(trainer.connection.peer, frames, world.now)
        world.server.work()
    world.server.receiver.outbox.clear()
    trainer.sender.lost(world.now, "cut")
    trainer.settle()
    world.calm()

    assert [step for step, _ in world.server.applied] == [1]
    assert trainer.committed == {1}
    assert trainer.joined[-1].recent == (1,)


def test_restarted_server_continues_the_run_from_its_generation() -> None:
    world = World()
    trainer = world.trainer()
    for _ in range(10):
        trainer.train(world.now)
        world.turn()
    world.server.publish()
    for _ in range(10):
        trainer.train(world.now)
        world.turn()
    before = len(world.server.applied)
    world.server.restart()
    assert len(world.server.applied) < before
    for _ in range(40):
        trainer.train(world.now)
        world.turn()
    world.calm()

    assert len(trainer.joined) == 2
    assert trainer.joined[-1].last_step == world.server.durable[-1][0]
    assert world.server.applied[-1][0] == trainer.step
    check_agreement(world)


def test_requests_are_answered_in_order_with_earlier_snapshots() -> None:
    world = World()
    trainer = world.trainer()
    world.turn()
    world.turn()
    trainer.train(world.now)
    trainer.train(world.now)
    request = trainer.sender.request_publish(pin=True)
    world.calm()

    assert [answer.request for answer in trainer.answers] == [request]
    assert trainer.answers[0].step == 2
    assert world.server.durable[-1][0] == 2


def test_finish_closes_the_session_on_both_ends() -> None:
    world = World()
    trainer = world.trainer()
    world.turn()
    world.turn()
    trainer.train(world.now)
    trainer.sender.request_finish()
    world.calm()

    assert trainer.sender.state is SenderState.CLOSED
    assert trainer.answers[0].error is None
    assert world.server.durable == world.server.applied


def test_rewind_starts_steps_after_the_generation() -> None:
    world = World()
    trainer = world.trainer()
    world.turn()
    for _ in range(6):
        trainer.train(world.now)
        world.turn()
        world.turn()
        if trainer.step == 3:
            world.server.publish()
    trainer.rewind(4)
    world.calm()
    assert trainer.answers[-1].step == 3
    trainer.train(world.now)
    world.calm()

    assert [step for step, _ in world.server.applied] == [1, 2, 3, 5]
    assert world.server.applied[-1][1] == trainer.sent[5]


def test_offering_a_step_twice_is_a_local_error() -> None:
    world = World()
    trainer = world.trainer()
    trainer.train(0.0)

    with pytest.raises(LocalProtocolError, match="step 1 is not after step 1"):
        trainer.sender.offer(1, 1, 0.0)


def test_silent_server_loses_only_the_connection() -> None:
    world = World()
    trainer = world.trainer()
    world.turn()
    world.turn()
    take = Server.take
    world.server.take = lambda *_: None  # type: ignore[method-assign]
    for _ in range(60):
        trainer.train(world.now)
        world.turn(seconds=0.25)
    assert len(trainer.connections) > 1
    world.server.take = take.__get__(world.server)  # type: ignore[method-assign]
    world.calm()

    assert trainer.committed == set(trainer.sent)


def test_token_is_proved_without_being_sent() -> None:
    world = World(token="secret-token")
    trainer = world.trainer(token="secret-token")
    world.turn()
    assert all(b"secret-token" not in frame for c in trainer.connections for frames in c.up for frame in frames)
    world.run(8)
    trainer.train(world.now)
    world.calm()

    assert trainer.committed == {1}


@pytest.mark.parametrize("token", [None, "wrong"])
def test_missing_or_wrong_token_is_final_and_names_the_variable(token: str | None) -> None:
    world = World(token="secret-token")
    trainer = world.trainer(token=token)
    world.run(8)

    assert trainer.sender.state is SenderState.FAILED
    assert trainer.refused is not None
    assert trainer.refused.code is RejectCode.UNAUTHORIZED
    assert "EMA_TOKEN" in trainer.refused.text
    assert not world.server.applied


def joined_pair(first: int, second: int) -> tuple[World, Trainer, Trainer]:
    world = World()
    old = world.trainer("old", incarnation=first)
    world.turn()
    world.turn()
    old.train(world.now)
    world.calm()
    return world, old, world.trainer("new", incarnation=second)


def test_higher_incarnation_evicts_the_older_trainer_at_once() -> None:
    world, old, new = joined_pair(0, 1)
    world.run(6)

    assert old.refused is not None
    assert old.refused.code is RejectCode.EVICTED
    assert new.sender.state is SenderState.STREAMING


def test_lower_incarnation_is_refused() -> None:
    world, old, new = joined_pair(1, 0)
    world.run(6)

    assert new.refused is not None
    assert new.refused.code is RejectCode.EVICTED
    assert old.sender.state is SenderState.STREAMING


def test_equal_incarnation_is_refused_while_the_older_trainer_lives() -> None:
    world, old, new = joined_pair(0, 0)
    world.run(20)

    assert new.refused is not None
    assert new.refused.code is RejectCode.RUN_IN_USE
    assert old.sender.state is SenderState.STREAMING


def test_killed_trainer_that_returns_takes_over_after_the_probe() -> None:
    world, old, new = joined_pair(0, 0)
    world.trainers.remove(old)
    started = world.now
    world.run(30, seconds=0.1)

    assert new.sender.state is SenderState.STREAMING
    assert world.now - started >= 2.0
    new.step = 1
    new.train(world.now)
    world.calm()
    assert world.server.applied[-1] == (2, new.sent[2])


def test_buffered_frames_of_a_killed_trainer_answer_no_probe() -> None:
    world, old, new = joined_pair(0, 0)
    old.train(world.now)
    old.write()
    world.trainers.remove(old)
    connection = old.connections[-1]
    for _ in range(40):
        world.turn(seconds=0.1)
        if connection.up:
            world.server.take(connection.peer, connection.up.popleft(), world.now)

    assert new.sender.state is SenderState.STREAMING
