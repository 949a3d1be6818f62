"""Several ranks under every fault of networks and restarts: no step is ever assembled from parts of different steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ema_proto.errors import RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN
from ema_proto.receiver import streaming
from support import memory_server
from support.examples import examples
from support.pair import Faults, Trainer, World

_FAULTS = st.builds(
    Faults,
    lose=st.sampled_from([0.0, 0.02, 0.1]),
    double=st.sampled_from([0.0, 0.05]),
    reorder=st.sampled_from([0.0, 0.05]),
    truncate=st.sampled_from([0.0, 0.02]),
    stale=st.sampled_from([0.0, 0.2]),
    unshared=st.sampled_from([0.0, 0.3]),
)


def _train(world: World, ranks: int, rng: random.Random, skips: float) -> None:
    """One step of all ranks: each offers its part, or skips it alone."""
    for trainer in world.trainers[-ranks:]:
        if rng.random() < skips or not trainer.train(world.now):
            trainer.skip()


def _check(world: World) -> None:
    """Each applied snapshot is made of the parts that the ranks of one gang took at that step."""
    gangs: dict[str, list[Trainer]] = {}
    for trainer in world.trainers:
        gangs.setdefault(trainer.name.partition("r")[0], []).append(trainer)
    for life in world.server.lives:
        steps = [step for step, _ in life]
        assert steps == sorted(set(steps))
        for step, content in life:
            parts = [[trainer.part(step) for trainer in ranks] for ranks in gangs.values()]
            assert content in [b"".join(part or b"?" for part in each) for each in parts]
    applied = {step for step, _ in world.server.applied}
    for trainer in world.trainers:
        for step, _, code in trainer.outcomes:
            assert code is None or code is RejectCode.UNAVAILABLE or step not in applied or len(gangs) > 1


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    seed=st.integers(0, 2**32),
    faults=_FAULTS,
    ranks=st.integers(2, 4),
    restarts=st.integers(0, 2),
    skips=st.sampled_from([0.0, 0.05]),
    shm=st.booleans(),
)
def test_parts_of_different_steps_are_never_mixed(
    seed: int, faults: Faults, ranks: int, restarts: int, skips: float, shm: bool
) -> None:
    rng = random.Random(seed)
    world = World(rng=rng, shm=shm)
    for rank in range(ranks):
        world.rank(rank, ranks)
    restart_at = {rng.randrange(100) for _ in range(restarts)}
    for turn in range(100):
        if rng.random() < 0.5:
            _train(world, ranks, rng, skips)
        if rng.random() < 0.05:
            world.server.publish()
        if rng.random() < 0.03:
            rng.choice(world.trainers).sender.lost(world.now, "cut")
        if turn in restart_at:
            world.server.restart()
        world.turn(faults, seconds=rng.choice([0.01, 0.1, 0.5]))
    world.calm(1000)
    assert all(len(trainer.free) == 2 for trainer in world.trainers), "everything is answered once the network is well"
    _check(world)
    if any(trainer.refused for trainer in world.trainers):
        return  # a JOIN was damaged, which is final if it is a session's first
    for trainer in world.trainers:
        trainer.sender.lost(world.now, "cut")  # a lost CREDIT would be noticed after 30 s only
    world.calm()
    before = len(world.server.applied)
    for _ in range(5):
        _train(world, ranks, rng, 0.0)
        world.calm()
    assert len(world.server.applied) == before + 5
    _check(world)


@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), faults=_FAULTS, ranks=st.integers(2, 3), shm=st.booleans())
def test_parts_of_two_starts_of_a_job_are_never_mixed(seed: int, faults: Faults, ranks: int, shm: bool) -> None:
    rng = random.Random(seed)
    world = World(rng=rng, shm=shm)
    for rank in range(ranks):
        world.rank(rank, ranks)
    for turn in range(90):
        if turn == 40:
            newest = max(trainer.step for trainer in world.trainers)
            for rank in range(ranks):
                world.rank(rank, ranks, incarnation=1).step = newest
        if rng.random() < 0.5:
            _train(world, ranks, rng, 0.0)
        if turn < 60 and rng.random() < 0.3:  # the older start does not know yet that it has been replaced
            for trainer in world.trainers[:ranks]:
                trainer.train(world.now)
        world.turn(faults, seconds=rng.choice([0.01, 0.1, 0.5]))
    world.calm()
    _check(world)


def test_ranks_that_get_smaller_chunks_send_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_server, "CHUNK_BYTES", 4 * CHUNK_BYTES_MIN)
    monkeypatch.setattr(streaming, "GANG_WINDOW_BYTES", 3 * 2 * CHUNK_BYTES_MIN)
    world = World(rng=random.Random(1))
    for rank in range(3):
        world.rank(rank, 3)
    world.calm()
    for _ in range(5):
        _train(world, 3, world.rng, 0.0)
        world.calm()
    assert [step for step, _ in world.server.applied] == list(range(1, 6))
    _check(world)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_steps_count_on_a_network_without_faults(ranks: int) -> None:
    world = World(rng=random.Random(1))
    for rank in range(ranks):
        world.rank(rank, ranks)
    world.calm()
    for _ in range(20):
        _train(world, ranks, world.rng, 0.0)
        world.calm()
    assert [step for step, _ in world.server.applied] == list(range(1, 21))
    assert not world.server.dropped
    _check(world)
