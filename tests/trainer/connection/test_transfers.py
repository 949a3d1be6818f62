"""What is put after a copy from a device waits for that copy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest

from support.waiting import eventually
from trainer_client.connection.transfers import TransferQueue
from trainer_client.counters import Counters
from trainer_client.staging.slots import make_slots
from trainer_client.staging.transfer import AsyncCopy


class _Copy:
    """A copy that goes on until `end` is set."""

    lost = False

    def __init__(self) -> None:
        self.end = threading.Event()

    @property
    def finished(self) -> bool:
        return self.end.is_set()

    def wait(self) -> bool:
        return self.end.wait(30.0)


class _Queue:
    """A queue, and what became of what was put, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.queue = TransferQueue(
            lambda slot, step, mode: self.done.append(f"step {step}"),
            lambda slot: None,
            lambda step, why: self.done.append(f"skip {step}: {why}"),
            Counters(),
        )
        self.slot = make_slots(8, 1)[0]

    def put(self, step: int, copy: _Copy | None) -> None:
        self.queue.put(self.slot, step, "update", cast("AsyncCopy | None", copy))

    def then(self, name: str) -> None:
        self.queue.then(lambda: self.done.append(name))


@pytest.fixture
def queue() -> Iterator[_Queue]:
    queue = _Queue()
    yield queue
    queue.queue.close(10.0)


def test_call_is_made_at_once_where_no_copy_is_under_way(queue: _Queue) -> None:
    queue.put(1, None)
    queue.then("publish")

    assert queue.done == ["step 1", "publish"]


def test_call_waits_for_the_copies_before_it_and_comes_before_later_ones(queue: _Queue) -> None:
    first, second = _Copy(), _Copy()
    queue.put(1, first)
    queue.then("publish")
    queue.put(2, second)
    second.end.set()
    before = list(queue.done)
    first.end.set()
    eventually(lambda: queue.queue.idle(1.0), "all copies have ended")

    assert before == []
    assert queue.done == ["step 1", "publish", "step 2"]
