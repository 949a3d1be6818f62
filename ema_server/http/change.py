"""Asks the averager to add or remove an average. Comes in: names and a rule; goes out: a status, or the problem."""

from __future__ import annotations

from collections.abc import Callable

from ema_proto.averages.specs import parse_average
from ema_proto.errors import LocalProtocolError
from ema_server.averager.jobs import AddAverage, Changed, RemoveAverage, Unchanged, WhyNot
from ema_server.http.ask import ask_averager
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import run_status
from ema_server.http.services import Services
from ema_server.runs.status_store import AverageStatus

_CODES = {
    WhyNot.NOT_STREAMING: Code.NOT_STREAMING,
    WhyNot.NO_SUCH_AVERAGE: Code.AVERAGE_NOT_FOUND,
    WhyNot.CONFLICT: Code.AVERAGES_CONFLICT,
    WhyNot.OUT_OF_MEMORY: Code.OUT_OF_MEMORY,
    WhyNot.NOT_DURABLE: Code.PUBLISH_FAILED,
}


def average_status(services: Services, run: str, average: str) -> AverageStatus:
    """How an average of a run stands, or the problem that there is none."""
    shown = run_status(services, run).averages
    for status in shown:
        if status.name == average:
            return status
    names = ", ".join(status.name for status in shown)
    raise Problem(Code.AVERAGE_NOT_FOUND, f"run {run!r} has no average {average!r}; it has {names}")


async def add_average(services: Services, run: str, spec: str, name: str) -> AverageStatus:
    """Add an average to a run that streams, durably; an empty `name` stands for the rule's default.

    Raises:
        Problem: the rule cannot be read, or the run does not take it; the text says why.
    """
    run_status(services, run)
    try:
        rule = parse_average(spec, name=name)
    except LocalProtocolError as error:
        raise Problem(Code.INVALID, str(error)) from None

    def job(reply: Callable[[Changed | Unchanged], None]) -> AddAverage:
        return AddAverage(run, rule, reply)

    _check(await ask_averager(services, run, job))
    return average_status(services, run, rule.name)


async def remove_average(services: Services, run: str, average: str) -> None:
    """Remove an average from a run that streams, durably.

    Raises:
        Problem: there is none of that name, or it cannot be removed; the text says why.
    """
    average_status(services, run, average)

    def job(reply: Callable[[Changed | Unchanged], None]) -> RemoveAverage:
        return RemoveAverage(run, average, reply)

    _check(await ask_averager(services, run, job))


def _check(answer: Changed | Unchanged) -> None:
    if isinstance(answer, Unchanged):
        raise Problem(_CODES[answer.why], answer.text)
