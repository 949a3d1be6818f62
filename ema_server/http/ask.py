"""From a request on the event loop to the averager's thread and back: ask it something, and wait without blocking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from ema_server.averager.jobs import Job
from ema_server.http.problems import Code, Problem
from ema_server.http.services import Services

_Answer = TypeVar("_Answer")

DURABLE_WAIT_S = 900  # 100 GB at 110 MB/s, a slow disk


async def ask_averager(services: Services, run: str, job_of: Callable[[Callable[[_Answer], None]], Job]) -> _Answer:
    """Submit the job that is made for a reply, and return what it is answered with once that is durable.

    Raises:
        Problem: it took longer than `DURABLE_WAIT_S`, or the server is stopping.
    """
    if services.stopping.is_set():
        raise Problem(Code.NOT_READY, "the server has been asked to stop, and publishes every run before it ends")
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[_Answer] = loop.create_future()

    def settle(answer: _Answer) -> None:
        if not answered.done():  # the client may have gone away
            answered.set_result(answer)

    def reply(answer: _Answer) -> None:
        loop.call_soon_threadsafe(settle, answer)

    services.submit(job_of(reply))
    try:
        async with asyncio.timeout(DURABLE_WAIT_S):
            return await answered
    except TimeoutError:
        detail = f"run {run!r} is not durable after {DURABLE_WAIT_S} s; it is still being written"
        raise Problem(Code.PUBLISH_FAILED, detail) from None
