"""From a request on the event loop to the averager's thread and back: ask it to publish, and wait without blocking."""

from __future__ import annotations

import asyncio

from ema_server.http.problems import Code, Problem
from ema_server.http.services import Services
from ema_server.jobs import Durable, Failed, Publish

PUBLISH_WAIT_S = 900  # 100 GB at 110 MB/s, a slow disk


async def publish_now(services: Services, run: str) -> Durable:
    """Publish the run and return what is durable.

    Raises:
        Problem: the generation could not be written, with the reason, it took longer than `PUBLISH_WAIT_S`, or the
            server is stopping.
    """
    if services.stopping.is_set():
        raise Problem(Code.NOT_READY, "the server has been asked to stop, and publishes every run before it ends")
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Durable | Failed] = loop.create_future()

    def settle(result: Durable | Failed) -> None:
        if not answered.done():  # the client may have gone away
            answered.set_result(result)

    def reply(result: Durable | Failed) -> None:
        loop.call_soon_threadsafe(settle, result)

    services.submit(Publish(run, "request", reply))
    try:
        async with asyncio.timeout(PUBLISH_WAIT_S):
            result = await answered
    except TimeoutError:
        detail = f"run {run!r} is not durable after {PUBLISH_WAIT_S} s; it is still being written"
        raise Problem(Code.PUBLISH_FAILED, detail) from None
    if isinstance(result, Failed):
        raise Problem(
            Code.PUBLISH_FAILED, f"run {run!r}: {result.text}. Averaging goes on, and publishing is tried again"
        )
    return result
