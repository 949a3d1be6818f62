"""When generations are made, what they hold while snapshots keep coming, and what happens when the disk fails."""

from __future__ import annotations

import json
import math
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_server.averager.active_run import FIRST_S
from ema_server.averager.jobs import Applied, Durable, Failed, NotInMemory, Publish, Quarantined, Rewound
from ema_server.compute.kernel import BlockSink
from ema_server.compute.pool import WorkerPool
from ema_server.publishing.publisher import PRUNE_EVERY_S
from ema_server.storage.catalog import HOLD_GRACE_S, Version
from ema_server.tensors.layout import Form, Segment
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core, versions_by_average
from support.waiting import eventually


@cache
def _weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.rand(70_000, generator=torch.Generator().manual_seed(step)), "n": torch.tensor(step)}


_MANIFEST = manifest_of(_weights(1))


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST))
        yield core


def _apply(core: ServerCore, *steps: int) -> None:
    for step in steps:
        assert isinstance(core.apply("r", step, _weights(step)), Applied)


def _check(core: ServerCore, version: Version, steps: list[int]) -> None:
    ledger = json.loads((version.folder / "version.json").read_text())["ledger"]
    assert ledger_steps(ledger) == steps
    assert largest_difference(replay(ledger, 0.9, _weights), core.load(version)) <= bound(ledger, 0.9, 1.0)


@contextmanager
def _blocked_averager(core: ServerCore) -> Iterator[None]:
    """Inside the block the averager takes no job; submitted ones wait in its queue."""
    entered, go_on = threading.Event(), threading.Event()

    def block(_: Any) -> None:
        entered.set()
        go_on.wait(WAIT_S)

    core.averager.submit(Publish("no-such-run", "request", block))
    assert entered.wait(WAIT_S)
    yield
    go_on.set()


def _forbid_separate_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: WorkerPool, segments: tuple[Segment, ...], forms: tuple[Form, ...], sink: BlockSink) -> None:
        raise AssertionError("a snapshot was waiting: its pass had to write the draft")

    monkeypatch.setattr(WorkerPool, "write", write)


def test_draft_is_written_by_the_next_pass_before_it_changes_anything(
    core: ServerCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _apply(core, 1, 2)
    answers: Queue[Durable | Failed] = Queue()
    applied: Queue[Applied | Quarantined | NotInMemory] = Queue()
    _forbid_separate_write(monkeypatch)
    with _blocked_averager(core):
        for _ in range(2):
            core.averager.submit(Publish("r", "request", answers.put))
        for step in (3, 4):
            core.averager.submit(core.apply_job("r", step, _weights(step), applied.put))

    outcomes = [applied.get(timeout=WAIT_S) for _ in range(2)]
    assert [outcome.step for outcome in outcomes if isinstance(outcome, Applied)] == [3, 4]
    first, second = (durable(answers.get(timeout=WAIT_S)) for _ in range(2))
    assert first == second, "two requests at one step are one generation"
    monkeypatch.undo()
    _check(core, versions_by_average(first)["ema-0.9"], [1, 2])
    _check(core, versions_by_average(core.publish("r"))["ema-0.9"], [1, 2, 3, 4])


def test_draft_does_not_wait_for_a_refused_or_repeated_snapshot(core: ServerCore) -> None:
    _apply(core, 1, 2)
    answers: Queue[Durable | Failed] = Queue()
    dirty = {**_weights(3), "w": torch.full((70_000,), math.nan)}
    for tensors, step in ((dirty, 3), (_weights(2), 2)):
        with _blocked_averager(core):
            core.averager.submit(Publish("r", "request", answers.put))
            core.averager.submit(core.apply_job("r", step, tensors, lambda _: None))
        assert durable(answers.get(timeout=WAIT_S)).step == 2


def test_publish_during_publish_reports_its_own_step(core: ServerCore) -> None:
    """Every answer has the run's step at the time of the request, or a later one."""
    answers: Queue[tuple[int, Durable | Failed]] = Queue()

    def answer(asked_at: int) -> Callable[[Durable | Failed], None]:
        return lambda outcome: answers.put((asked_at, outcome))

    for step in range(1, 41):
        _apply(core, step)
        core.averager.submit(Publish("r", "request", answer(step)))
    for _ in range(40):
        asked_at, outcome = answers.get(timeout=WAIT_S)
        assert (durable(outcome).step or 0) >= asked_at
    assert [step for _, step in core.announced] == sorted({step for _, step in core.announced})


def test_schedule_publishes_only_changed_runs(tmp_path: Path) -> None:
    clock = _Clock()
    with running_core(tmp_path, clock=clock, publish_every_seconds=0.2) as core:
        joined(core.join("r", _MANIFEST))
        _apply(core, 1)
        assert core.announced == []
        clock.now += 0.25
        core.settled("r", lambda status: status.published_step == 1)
        clock.now += 10
        core.settled("r", lambda status: status.step == 1)
        _apply(core, 2)
        core.settled("r", lambda status: status.published_step == 2)
        assert core.announced == [("r", 1), ("r", 2)]


def test_first_generation_is_published_early(tmp_path: Path) -> None:
    clock = _Clock()
    with running_core(tmp_path, clock=clock, publish_every_seconds=300) as core:
        joined(core.join("r", _MANIFEST))
        _apply(core, 1)
        clock.now += FIRST_S + 1
        core.settled("r", lambda status: status.published_step == 1)
        _apply(core, 2)
        clock.now += FIRST_S + 1
        _apply(core, 3)
        assert core.announced == [("r", 1)]
        clock.now += 300
        core.settled("r", lambda status: status.published_step == 3)


def test_publish_every_steps(tmp_path: Path) -> None:
    with running_core(tmp_path, publish_every_steps=10) as core:
        joined(core.join("r", _MANIFEST, first_step=101))
        for step in range(101, 136):
            _apply(core, step)
            core.settled("r", lambda status: (status.published_step or 100) + 10 > (status.step or 0))
        assert core.announced == [("r", 110), ("r", 120), ("r", 130)]


def test_a_trainer_asks_for_generations_within_the_bounds_of_the_server(tmp_path: Path) -> None:
    clock = _Clock()
    with running_core(tmp_path, clock=clock, publish_min_seconds=10) as core:
        joined(core.join("r", _MANIFEST, publish_every_steps=10))
        joined(core.join("other", _MANIFEST))
        for step in range(1, 31):
            if step == 30:
                clock.now += 11
            _apply(core, step)
            assert isinstance(core.apply("other", step, _weights(step)), Applied)
        core.settled("r", lambda status: status.published_step == 30)
        clock.now += 11
        _apply(core, *range(31, 40))
        assert core.announced == [("r", 30)]
        _apply(core, 40)
        core.settled("r", lambda status: status.published_step == 40)
        finished = [durable(core.finish(run)).warning or "" for run in ("r", "other")]

    assert "publish_every_steps=10 asks for, as the server makes them at least 10 s apart" in finished[0]
    assert "publish_every_steps" not in finished[1]


def test_without_a_shortest_time_a_trainer_gets_what_it_asks_for(tmp_path: Path) -> None:
    with running_core(tmp_path, publish_min_seconds=0) as core:
        joined(core.join("r", _MANIFEST, publish_every_steps=10))
        for step in range(1, 36):
            _apply(core, step)
            core.settled("r", lambda status: (status.published_step or 0) + 10 > (status.step or 0))
        assert core.announced == [("r", 10), ("r", 20), ("r", 30)]
        assert "publish_every_steps" not in (durable(core.finish("r")).warning or "")


@contextmanager
def _largest_file(nbytes: int) -> Iterator[None]:
    """Limit the size of files that this process writes to `nbytes`, to simulate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 40, 100_000])
def test_full_disk_stops_publishing_but_not_averaging(tmp_path: Path, nbytes: int) -> None:
    """The write fails at the header, within the header, or within the weights; then, after 10 s, it is tried again."""
    clock = _Clock()
    with running_core(tmp_path, clock=clock) as core:
        joined(core.join("r", _MANIFEST))
        _apply(core, 1, 2)
        durable(core.publish("r"))
        _apply(core, 3)
        with _largest_file(nbytes):
            answer = core.publish("r")
            assert isinstance(answer, Failed)
            assert "could not be written: File too large" in answer.text
            _apply(core, 4)
            status = core.settled("r", lambda status: status.publish_error is not None)
            assert (status.step, status.published_step) == (4, 2)
            folder = core.data_dir.generations_folder("r")
            assert [path.name for path in folder.iterdir()] == [f"{1:08d}-{2:012d}"], "nothing half is left"
        clock.now += 9
        _apply(core, 5)
        assert core.announced == [("r", 2)]
        clock.now += 2
        status = core.settled("r", lambda status: status.published_step == 5)
        assert status.publish_error is None
        _check(core, core.catalog.versions("r", "ema-0.9")[0], [1, 2, 3, 4, 5])


def test_ended_run_on_a_full_disk_stays_in_memory_until_durable(tmp_path: Path) -> None:
    clock = _Clock()
    with running_core(tmp_path, clock=clock) as core:
        joined(core.join("r", _MANIFEST))
        _apply(core, 1, 2)
        with _largest_file(100):
            core.leave("r", lost=True)
            status = core.settled("r", lambda status: status.publish_error is not None)
            assert status.memory_bytes > 0
            assert isinstance(core.finish("r"), Failed)
        clock.now += 11
        status = core.settled("r", lambda status: status.memory_bytes == 0)
        assert (status.published_step, status.publish_error) == (2, None)


def test_newest_pinned_and_first_generations_are_kept(tmp_path: Path) -> None:
    with running_core(tmp_path, keep_generations=2) as core:
        joined(core.join("r", _MANIFEST))
        for step in range(1, 16):
            _apply(core, step)
            durable(core.publish("r", "checkpoint" if step <= 12 else "request"))

        kept = [generation.step for generation in core.catalog.generations("r")]
        assert kept == [15, 14, *range(12, 2, -1), 1]
        folders = core.data_dir.generations_folder("r").glob("0*")
        assert {int(folder.name.split("-")[1]) for folder in folders} == set(kept)


def test_checkpoint_of_a_published_step_pins_it(tmp_path: Path) -> None:
    with running_core(tmp_path, keep_generations=1) as core:
        joined(core.join("r", _MANIFEST))
        _apply(core, 1)
        plain = durable(core.publish("r"))
        pinned = durable(core.publish("r", "checkpoint"))
        assert not pinned.new
        assert [v.id for v in pinned.versions] == [v.id for v in plain.versions]
        _apply(core, 2)
        durable(core.publish("r"))
        _apply(core, 3)
        durable(core.publish("r"))
        assert [generation.step for generation in core.catalog.generations("r")] == [3, 1]
        assert isinstance(core.rewind("r", 1), Rewound)
        assert core.catalog.generations("r")[0].pinned, "a rewind to a checkpoint leaves it one"


def test_held_version_keeps_its_files(tmp_path: Path) -> None:
    clock = _Clock()
    with running_core(tmp_path, clock=clock, keep_generations=1) as core:
        joined(core.join("r", _MANIFEST))
        _apply(core, 1)
        durable(core.publish("r"))  # the first stays anyway
        _apply(core, 2)
        old = versions_by_average(core.publish("r"))["raw"]

        def publish(step: int) -> None:
            _apply(core, step)
            durable(core.publish("r"))

        with core.catalog.hold(old):
            clock.now += 1000
            publish(3)
            assert largest_difference(_weights(2), core.load(old)) == 0
        clock.now += 59
        publish(4)
        assert old in core.catalog.versions("r", "raw"), "a download in parts comes back"
        clock.now += 2
        publish(5)
        assert core.catalog.find("r", "raw", old.id) is None
        assert not old.folder.exists()


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_a_run_that_publishes_no_more_is_pruned_when_its_versions_are_released(
    tmp_path: Path, is_in_memory: bool
) -> None:
    clock = _Clock()
    with running_core(tmp_path, clock=clock, keep_generations=1) as core, ExitStack() as downloads:
        joined(core.join("r", _MANIFEST))
        folder = core.data_dir.generations_folder("r")

        def publish(step: int) -> Version:
            _apply(core, step)
            return versions_by_average(core.publish("r"))["raw"]

        def wait_for(*steps: int) -> None:
            clock.now += HOLD_GRACE_S + PRUNE_EVERY_S
            eventually(lambda: _steps(core) == list(steps), f"only {steps} are left", WAIT_S)
            eventually(lambda: len(list(folder.iterdir())) == len(steps), "their folders too", WAIT_S)

        publish(1)
        second = publish(2)
        with core.catalog.hold(second):
            downloads.enter_context(core.catalog.hold(publish(3)))
            _apply(core, 4)
            durable(core.publish("r") if is_in_memory else core.finish("r"))
            if not is_in_memory:
                core.settled("r", lambda status: status.memory_bytes == 0)
            assert _steps(core) == [4, 3, 2, 1], "both are being read"
        wait_for(4, 3, 1)
        downloads.close()
        wait_for(4, 1)


def _steps(core: ServerCore) -> list[int]:
    return [generation.step for generation in core.catalog.generations("r")]


def test_stopping_publishes_every_run(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        for run in ("a", "b", "c"):
            joined(core.join(run, _MANIFEST))
            core.apply(run, 1, _weights(1))
        durable(core.publish("a"))
        core.apply("a", 2, _weights(2))
    with running_core(tmp_path) as core:
        assert {status.run: status.step for status in core.statuses.all()} == {"a": 2, "b": 1, "c": 1}


def test_stopping_reports_what_is_not_durable(tmp_path: Path) -> None:
    core = ServerCore(tmp_path)
    core.start()
    joined(core.join("r", _MANIFEST))
    _apply(core, 1)
    with _largest_file(100):
        assert not core.stop()


def test_requests_for_runs_that_are_not_in_memory(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        assert isinstance(core.publish("unknown"), Failed)
        joined(core.join("r", _MANIFEST))
        assert durable(core.publish("r")) == Durable(None, (), new=False)
        _apply(core, 1)
        before = durable(core.finish("r"))
        core.settled("r", lambda status: status.memory_bytes == 0)
        after = durable(core.publish("r"))
        assert (after.new, after.versions) == (False, before.versions)
        assert isinstance(core.rewind("r", 1), Failed)
        assert isinstance(core.apply("r", 2, _weights(2)), NotInMemory)


def test_only_a_rewind_verifies_files_of_this_process_again(core: ServerCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred gigabytes would keep the publisher for minutes, each time an average is added."""
    read: list[str] = []
    monkeypatch.setattr("ema_server.publishing.commit.verify", lambda folder, record: read.append(folder.name))
    joined(core.join("r", _MANIFEST))
    _apply(core, 1)
    durable(core.publish("r"))
    durable(core.publish("r", "checkpoint"))
    assert [generation.pinned for generation in core.catalog.generations("r")][:1] == [True]
    assert read == []
    _apply(core, 2)
    assert isinstance(core.rewind("r", 1), Rewound)
    assert len(read) == 1


@pytest.mark.parametrize(
    ("settings", "asked", "averages", "seconds", "steps"),
    [
        ({"publish_every_seconds": 300.0}, None, ("raw",), 300.0, None),
        ({"publish_every_seconds": 0.0}, None, ("raw",), None, None),
        ({"publish_every_steps": 50}, 20, ("raw",), None, 20),
        ({"publish_every_steps": 10}, 20, ("raw",), None, 10),
        ({"ring_every_steps": 8}, None, ("power:sigma_rel=0.05", "power:sigma_rel=0.1"), None, 8),
        ({"ring_every_steps": 8}, None, ("raw",), None, None),
    ],
)
def test_status_says_how_often_a_run_is_published(
    tmp_path: Path,
    settings: dict[str, Any],
    asked: int | None,
    averages: tuple[str, ...],
    seconds: float | None,
    steps: int | None,
) -> None:
    with running_core(tmp_path, **settings) as core:
        joined(core.join("r", _MANIFEST, averages, publish_every_steps=asked))
        core.apply("r", 1, _weights(1))
        status = core.statuses.get("r")
        assert status is not None
        assert (status.publish_every_seconds, status.publish_every_steps) == (seconds, steps)
        durable(core.finish("r"))
        status = core.settled("r", lambda status: status.memory_bytes == 0)
        assert (status.publish_every_seconds, status.publish_every_steps) == (None, None)
