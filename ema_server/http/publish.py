"""Asks the averager to publish a run. Comes in: its name; goes out: what is durable, or the problem."""

from __future__ import annotations

from collections.abc import Callable

from ema_server.averager.jobs import Durable, Failed, Publish
from ema_server.http.ask import ask_averager
from ema_server.http.problems import Code, Problem
from ema_server.http.services import Services


async def publish_now(services: Services, run: str) -> Durable:
    """Publish the run and return what is durable.

    Raises:
        Problem: the generation could not be written, with the reason, it took too long, or the server is stopping.
    """

    def job(reply: Callable[[Durable | Failed], None]) -> Publish:
        return Publish(run, "request", reply)

    result = await ask_averager(services, run, job)
    if isinstance(result, Failed):
        raise Problem(
            Code.PUBLISH_FAILED, f"run {run!r}: {result.text}. Averaging goes on, and publishing is tried again"
        )
    return result
