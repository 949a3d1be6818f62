"""Sender and receiver connected by a faulty network, while both processes restart."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ema_proto.sender.events import SenderState
from support.examples import examples
from support.pair import Faults, World, check_agreement

pytestmark = pytest.mark.slow

faults = st.builds(
    Faults,
    lose=st.sampled_from([0.0, 0.02, 0.1]),
    double=st.sampled_from([0.0, 0.05, 0.2]),
    reorder=st.sampled_from([0.0, 0.05, 0.3]),
    truncate=st.sampled_from([0.0, 0.02, 0.05]),
    stale=st.sampled_from([0.0, 0.2, 1.0]),
    unshared=st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    seed=st.integers(0, 2**32),
    faults=faults,
    restarts=st.integers(0, 3),
    chunks=st.sampled_from([0.5, 2.5, 12.0]),
    shm=st.booleans(),
)
def test_both_ends_agree_under_any_network_fault(
    seed: int, faults: Faults, restarts: int, chunks: float, shm: bool
) -> None:
    rng = random.Random(seed)
    world = World(rng=rng, shm=shm)
    files = {f"{number}.json": rng.randbytes(rng.randrange(200_000)) for number in range(rng.randrange(4))}
    trainer = world.trainer(chunks=chunks, files=files or None)
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
    if trainer.sender.state is SenderState.STREAMING:  # a first JOIN that is damaged is refused for good
        assert sorted(world.server.files.values()) == sorted(files.values())
    check_agreement(world)


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), faults=faults, shm=st.booleans())
def test_competing_trainers_never_mix_their_bytes(seed: int, faults: Faults, shm: bool) -> None:
    rng = random.Random(seed)
    world = World(rng=rng, shm=shm)
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


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), faults=faults, restarts=st.integers(0, 2), shm=st.booleans())
def test_both_ends_agree_on_every_step_after_repeated_rewinds(
    seed: int, faults: Faults, restarts: int, shm: bool
) -> None:
    """A step number then names several snapshots, and each answer has to be about the right one."""
    rng = random.Random(seed)
    world = World(rng=rng, shm=shm)
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
