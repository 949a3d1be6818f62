"""Bodies with tensors: checked before they are read, few in memory at once, with a timeout."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.torch import save
from starlette.testclient import TestClient

from ema_server.derived.queue import QUEUE_MAX, Busy
from ema_server.http import middleware
from ema_server.http.services import UPLOADS_MAX
from support.served import WAIT_S, Served, weights

Send = Callable[..., HTTPConnection]


@pytest.fixture
def address(served: Served) -> str:
    version = served.publish("digits", 100).versions[0]
    return f"/v1/runs/digits/averages/ema-0.9/versions/{version.id}/recalibrate"


@pytest.fixture
def begin(url: str) -> Iterator[Send]:
    """Begin an upload of which nothing comes but the head; all of them end with the test."""
    with ExitStack() as stack:

        def begin(path: str, nbytes: int = 1000) -> HTTPConnection:
            place = urlsplit(url)
            connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT_S)
            stack.enter_context(closing(connection))
            connection.putrequest("POST", path)
            connection.putheader("Content-Length", str(nbytes))
            connection.endheaders()
            return connection

        yield begin


def _answer(connection: HTTPConnection) -> tuple[int, Any]:
    with connection.getresponse() as response:
        return response.status, json.loads(response.read())


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/runs/none/averages/raw/versions/{id}/recalibrate", 404, "run_not_found"),
        ("/v1/runs/digits/averages/raw/versions/{id}/recalibrate", 404, "average_not_found"),
        ("/v1/runs/digits/averages/ema-0.9/versions/{id}/recalibrate", 404, "version_not_found"),
        ("/v1/runs/digits/averages/ema-0.9/versions/latest/recalibrate", 422, "invalid"),
    ],
)
def test_impossible_upload_is_refused_before_its_body(
    begin: Send, address: str, path: str, status: int, code: str
) -> None:
    found, problem = _answer(begin(path.format(id="0" * 40)))

    assert (found, problem["code"]) == (status, code)


def test_name_of_an_average_is_refused_before_the_body(begin: Send, address: str, served: Served) -> None:
    served.show("digits", 100, ["ema-0.9", "EMA-0.9-BN"])

    status, problem = _answer(begin(address))

    assert (status, problem["code"]) == (409, "name_taken")


def test_number_of_concurrent_uploads_is_bounded(begin: Send, address: str) -> None:
    stalled = [begin(address) for _ in range(3 * UPLOADS_MAX)]
    with ThreadPoolExecutor(len(stalled)) as pool:
        answers = [pool.submit(connection.getresponse) for connection in stalled]
        first = islice(as_completed(answers, WAIT_S), len(stalled) - UPLOADS_MAX)
        refused = [answer.result() for answer in first]
        for connection, answer in zip(stalled, answers, strict=True):
            if not answer.done():
                connection.send(b"\0" * 1000)
        others = [answer.result(WAIT_S) for answer in answers if answer.result(WAIT_S) not in refused]

    assert {response.status for response in refused} == {503}
    assert {json.loads(response.read())["code"] for response in refused} == {"busy"}
    assert all(int(response.getheader("Retry-After") or "0") >= 1 for response in refused)
    assert len(others) == UPLOADS_MAX
    assert 503 not in {response.status for response in others}
    again = begin(address)
    again.send(b"\0" * 1000)
    assert _answer(again)[0] != 503, "there is room again"


def test_body_that_does_not_arrive_times_out(begin: Send, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "UPLOAD_S", 0.05)

    status, problem = _answer(begin(address))

    assert (status, problem["code"]) == (408, "upload_timeout")
    assert problem["detail"] == "the body has not arrived after 0.05 s: send it again"


def test_queue_of_derived_versions_is_bounded(client: TestClient, served: Served, address: str) -> None:
    go_on = threading.Event()
    with ThreadPoolExecutor(QUEUE_MAX) as pool:
        entered = threading.Semaphore(0)

        def one() -> Future[bool]:
            return pool.submit(asyncio.run, _counted(entered, served, go_on))

        waiting = [one() for _ in range(QUEUE_MAX)]
        try:
            assert all(entered.acquire(timeout=WAIT_S) for _ in range(QUEUE_MAX))
            answer = client.post(address, content=save(weights("ema-0.9", 100, 8)))
            assert (answer.status_code, answer.json()["code"]) == (503, "busy")
            assert f"{QUEUE_MAX} versions are being made or waiting" in answer.json()["detail"]
            assert int(answer.headers["Retry-After"]) >= 1
            with pytest.raises(Busy):
                asyncio.run(served.deriving.run(go_on.is_set))
        finally:
            go_on.set()
        assert all(made.result(WAIT_S) for made in waiting)
    assert asyncio.run(served.deriving.run(go_on.is_set)), "there is room again"


async def _counted(entered: threading.Semaphore, served: Served, go_on: threading.Event) -> bool:
    making = asyncio.ensure_future(served.deriving.run(lambda: go_on.wait(WAIT_S)))
    await asyncio.sleep(0)
    entered.release()
    return await making
