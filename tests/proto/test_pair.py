"""Sender and receiver against each other, with and without faults."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.sender import SenderState
from support.pair import Faults, Server, Trainer, World


def check_agreement(world: World) -> None:
    """What was applied is what one session sent, in order, once; and both ends tell the same story of each step."""
    for life in world.server.lives:
        steps = [step for step, _ in life]
        assert steps == sorted(set(steps))
        for step, content in life:
            assert any((step, content) in trainer.offered for trainer in world.trainers)
    ever_applied, applied = set(world.server.history), set(world.server.applied)
    for trainer in world.trainers:
        for step, content, code in trainer.outcomes:
            if code is None:
                assert (step, content) in ever_applied
            elif code is not RejectCode.UNAVAILABLE:  # given up unanswered: nobody claims to know
                assert (step, content) not in applied


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
def test_any_size_gets_through_the_credit_window(chunks: float) -> None:
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


def test_a_lost_connection_resends_what_was_not_answered() -> None:
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


def test_a_commit_whose_answer_was_lost_is_not_applied_twice() -> None:
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


def test_a_restarted_server_is_noticed_and_the_run_goes_on_from_its_durable_state() -> None:
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


def test_requests_are_answered_in_order_with_the_snapshots_before_them() -> None:
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


def test_a_rewind_starts_steps_again_after_the_generation() -> None:
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


def test_offering_a_step_twice_is_the_callers_fault() -> None:
    world = World()
    trainer = world.trainer()
    trainer.train(0.0)

    with pytest.raises(LocalProtocolError, match="step 1 is not after step 1"):
        trainer.sender.offer(1, 1, 0.0)


def test_a_silent_server_costs_the_connection_and_nothing_else() -> None:
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


def test_the_right_token_is_proved_without_being_sent() -> None:
    world = World(token="secret-token")
    trainer = world.trainer(token="secret-token")
    world.turn()
    assert all(b"secret-token" not in frame for c in trainer.connections for frames in c.up for frame in frames)
    world.run(8)
    trainer.train(world.now)
    world.calm()

    assert trainer.committed == {1}


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_missing_or_wrong_token_is_final_and_says_what_to_set(token: str | None) -> None:
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


def test_a_higher_incarnation_evicts_the_older_trainer_at_once() -> None:
    world, old, new = joined_pair(0, 1)
    world.run(6)

    assert old.refused is not None
    assert old.refused.code is RejectCode.EVICTED
    assert new.sender.state is SenderState.STREAMING


def test_a_lower_incarnation_is_refused() -> None:
    world, old, new = joined_pair(1, 0)
    world.run(6)

    assert new.refused is not None
    assert new.refused.code is RejectCode.EVICTED
    assert old.sender.state is SenderState.STREAMING


def test_an_equal_incarnation_is_refused_while_the_older_trainer_lives() -> None:
    world, old, new = joined_pair(0, 0)
    world.run(20)

    assert new.refused is not None
    assert new.refused.code is RejectCode.RUN_IN_USE
    assert old.sender.state is SenderState.STREAMING


def test_a_killed_trainer_that_comes_back_at_once_takes_over_after_the_probe() -> None:
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


def test_leftover_frames_of_a_killed_trainer_are_no_sign_of_life() -> None:
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


faults = st.builds(
    Faults,
    lose=st.sampled_from([0.0, 0.02, 0.1]),
    double=st.sampled_from([0.0, 0.05, 0.2]),
    reorder=st.sampled_from([0.0, 0.05, 0.3]),
    truncate=st.sampled_from([0.0, 0.02, 0.05]),
    stale=st.sampled_from([0.0, 0.2, 1.0]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(seed=st.integers(0, 2**32), faults=faults, restarts=st.integers(0, 3), chunks=st.sampled_from([0.5, 2.5, 12.0]))
def test_whatever_the_network_does_both_ends_agree(seed: int, faults: Faults, restarts: int, chunks: float) -> None:
    rng = random.Random(seed)
    world = World(rng=rng)
    trainer = world.trainer(chunks=chunks)
    restart_at = {rng.randrange(120) for _ in range(restarts)}
    for turn in range(120):
        if rng.random() < 0.5:
            trainer.train(world.now)
        if rng.random() < 0.05:
            world.server.publish()
        if rng.random() < 0.03:
            trainer.sender.lost(world.now, "cut")
        if turn in restart_at:
            world.server.restart()
        world.turn(faults, seconds=rng.choice([0.01, 0.1, 0.5]))
    world.calm()

    assert len(trainer.free) == 2, "everything offered is answered once the network is well"
    check_agreement(world)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), faults=faults)
def test_two_trainers_that_fight_for_a_run_never_mix_their_bytes(seed: int, faults: Faults) -> None:
    rng = random.Random(seed)
    world = World(rng=rng)
    world.trainer("a")
    for turn in range(80):
        if turn == 30:
            rival = world.trainer("b", incarnation=rng.choice([0, 1]))
            rival.step = rng.randrange(40)
            if rng.random() < 0.5:
                world.trainers[0].sender.bye()
        for trainer in world.trainers:
            if rng.random() < 0.5 and trainer.sender.state is SenderState.STREAMING:
                trainer.train(world.now)
        world.turn(faults, seconds=rng.choice([0.01, 0.1, 0.5]))
    world.calm()

    check_agreement(world)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), faults=faults, restarts=st.integers(0, 2))
def test_both_ends_agree_on_every_step_although_the_run_goes_back_again_and_again(
    seed: int, faults: Faults, restarts: int
) -> None:
    """A step number then names several snapshots, and each answer has to be about the right one."""
    rng = random.Random(seed)
    world = World(rng=rng)
    trainer = world.trainer(chunks=1.5)
    restart_at = {rng.randrange(120) for _ in range(restarts)}
    for turn in range(120):
        if rng.random() < 0.6:
            trainer.train(world.now)
        if rng.random() < 0.1:
            world.server.publish()
        if rng.random() < 0.05 and trainer.step > 1:
            trainer.rewind(rng.randrange(1, trainer.step))
        if rng.random() < 0.05:
            trainer.sender.request_publish(pin=False)
        if turn in restart_at:
            world.server.restart()
        world.turn(faults, seconds=rng.choice([0.01, 0.1, 0.5]))
    world.calm()
    world.run(200, seconds=2.0)  # a lost answer to a request is noticed late
    world.calm()

    assert len(trainer.free) == 2
    check_agreement(world)
