"""Commands to the averager: publish or delete a run, add or remove an average. Each awaits the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from ema_proto.averages.specs import parse_average
from ema_proto.errors import LocalProtocolError
from ema_server.averager.jobs import (
    AddAverage,
    Changed,
    Deleted,
    DeleteRun,
    Durable,
    Failed,
    Job,
    Publish,
    RemoveAverage,
    Unchanged,
    WhyNot,
)
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import average_status, run_status
from ema_server.http.services import Services
from ema_server.runs.status_store import AverageStatus

DURABLE_WAIT_S = 900  # 100 GB at 110 MB/s, a slow disk
_CODES = {
    WhyNot.NOT_STREAMING: Code.NOT_STREAMING,
    WhyNot.NO_SUCH_AVERAGE: Code.AVERAGE_NOT_FOUND,
    WhyNot.CONFLICT: Code.AVERAGES_CONFLICT,
    WhyNot.OUT_OF_MEMORY: Code.OUT_OF_MEMORY,
    WhyNot.NOT_DURABLE: Code.PUBLISH_FAILED,
}
_DELETE_CODES = {WhyNot.STREAMING: Code.RUN_STREAMING, WhyNot.NO_SUCH_RUN: Code.RUN_NOT_FOUND}
_Answer = TypeVar("_Answer")


async def publish(services: Services, run: str) -> Durable:
    """Publish the run and return what is durable.

    Raises:
        Problem: there is no such run, or the generation could not be written; so for a wait that is too long and a
            server that stops, below too.
    """
    name = run_status(services, run).run

    def job(reply: Callable[[Durable | Failed], None]) -> Publish:
        return Publish(name, "request", reply)

    result = await _ask_averager(services, name, job)
    if isinstance(result, Failed):
        detail = f"run {name!r}: {result.text}. Averaging continues, and publishing is tried again"
        raise Problem(Code.PUBLISH_FAILED, detail)
    return result


async def add_average(services: Services, run: str, spec: str, name: str) -> AverageStatus:
    """Add an average to a streaming run, durably; an empty `name` stands for the rule's default.

    Raises:
        Problem: the rule is invalid, or the run does not accept it; the text says why.
    """
    run_status(services, run)
    try:
        rule = parse_average(spec, name=name)
    except LocalProtocolError as error:
        raise Problem(Code.INVALID, str(error)) from None

    def job(reply: Callable[[Changed | Unchanged], None]) -> AddAverage:
        return AddAverage(run, rule, reply)

    _check(await _ask_averager(services, run, job))
    return average_status(services, run, rule.name)


async def remove_average(services: Services, run: str, average: str) -> None:
    """Remove an average from a streaming run, durably.

    Raises:
        Problem: there is none of that name, or it cannot be removed; the text says why.
    """
    average_status(services, run, average)

    def job(reply: Callable[[Changed | Unchanged], None]) -> RemoveAverage:
        return RemoveAverage(run, average, reply)

    _check(await _ask_averager(services, run, job))


async def delete_run(services: Services, run: str) -> None:
    """Delete a run, durably; also one of which no generation can be read.

    Raises:
        Problem: there is none of that name, a trainer streams it, or the disk refuses; the text says why.
    """
    if not services.has_folder(run):
        run_status(services, run)  # one without a folder may have a trainer that has not sent a snapshot

    def job(reply: Callable[[Deleted | Unchanged], None]) -> DeleteRun:
        return DeleteRun(run, reply)

    answer = await _ask_averager(services, run, job)
    if isinstance(answer, Unchanged):
        raise Problem(_DELETE_CODES.get(answer.why, Code.DELETE_FAILED), answer.text)


async def _ask_averager(services: Services, run: str, job_of: Callable[[Callable[[_Answer], None]], Job]) -> _Answer:
    """Submit the job that `job_of` makes for a reply, and return its answer, which comes once it is durable."""
    if services.stopping.is_set():
        raise Problem(Code.NOT_READY, "the server is stopping, and publishes every run before it ends")
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[_Answer] = loop.create_future()

    def settle(answer: _Answer) -> None:
        if not answered.done():  # the client may have disconnected
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


def _check(answer: Changed | Unchanged) -> None:
    if isinstance(answer, Unchanged):
        raise Problem(_CODES[answer.why], answer.text)
