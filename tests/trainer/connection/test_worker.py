"""The training thread's side of a connection: its slots, and when they are released."""

from __future__ import annotations

import gc
import weakref

import pytest

from ema_proto.sender.events import Answered
from support.peers import JOIN
from trainer_client import JoinError
from trainer_client.connection.driver import Pending
from trainer_client.connection.worker import Worker


def test_closed_worker_holds_no_slots() -> None:
    worker = Worker("tcp://127.0.0.1:9", token=None)  # nothing listens there
    with pytest.raises(JoinError, match="has not answered"):
        worker.join(JOIN, 0.0)
    slots = [weakref.ref(slot.view.obj) for slot in worker.slots]

    gc.collect()  # the error's traceback
    gc.disable()
    try:
        worker.close(5.0)
        assert [slot() for slot in slots] == [None, None]
    finally:
        gc.enable()


def test_requests_to_publish_do_not_pile_up_while_the_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("tcp://127.0.0.1:9", token=None)
    asked: list[Pending] = []
    monkeypatch.setattr(worker._driver, "ask", lambda request, pending: asked.append(pending))
    for _ in range(100):
        worker.publish_soon()
    assert len(asked) == 1
    asked[0].answer = Answered(1, 5, None)
    for _ in range(100):
        worker.publish_soon()
    worker.close(5.0)

    assert len(asked) == 2
