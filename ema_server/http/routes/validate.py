"""From a wish to validate to a result, without blocking the event loop. Says who is missing when nobody is at it."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from ema_server.evaluation.leases import Finding, Validation
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version
from ema_server.http.routes.lease_schemas import ValidationIn, ValidationOut
from ema_server.http.routes.reports import store_errors
from ema_server.http.services import Services
from ema_server.storage.catalog import Version

_LOOK_S = 0.2  # a look is one indexed row read by the database's thread


async def ask(services: Services, run: str, body: ValidationIn) -> ValidationOut:
    """Ask for a validation.

    Raises:
        Problem: there is no such version, or nobody would evaluate it.
    """
    version = find_version(services, run, body.average, body.rev)
    possible = _is_served(services, body.task) or services.validations.has_worker(run, body.average, body.task)
    with store_errors():
        found = await services.validations.request(version, body.task, again=body.again, possible=possible)
    if found is None:
        raise Problem(Code.NO_EVALUATOR, _how_to_start(services, version, body.task))
    return _shown(services, found)


async def look(services: Services, run: str, validation_id: str) -> ValidationOut:
    """A validation as it stands.

    Raises:
        Problem: the run has none of this id.
    """
    with store_errors():
        found = await services.validations.find(run, validation_id)
    if found is None:
        detail = f"run {run!r} has no validation {validation_id[:60]!r}; POST /v1/runs/{run}/validations asks for one"
        raise Problem(Code.VALIDATION_NOT_FOUND, detail)
    return _shown(services, found)


async def wait(services: Services, run: str, validation_id: str, wait_s: float) -> ValidationOut:
    """A validation as it stands once it has ended, after `wait_s`, or when the server stops; raises as `look` does."""
    deadline = time.monotonic() + wait_s
    while True:
        found = await look(services, run, validation_id)
        left_s = deadline - time.monotonic()
        if found.state in ("done", "failed") or left_s <= 0 or services.stopping.is_set():
            return found
        await asyncio.sleep(min(_LOOK_S, left_s))


def _is_served(services: Services, task: str) -> bool:
    """Whether the server has an evaluator of its own for the task."""
    return services.evaluator is not None and services.evaluator.task == task


def _how_to_start(services: Services, version: Version, task: str) -> str:
    others = services.validations.tasks()
    known = f" (workers are here for {', '.join(map(repr, others))})" if others else ""
    option = "" if task == "default" else f" --task {task}"
    return (
        f"no worker evaluates {version.run}/{version.average} for the task {task!r}{known}: start the server with "
        f"--evaluate module:function, or a worker with: ema evaluate module:function --run {version.run}{option}"
    )


def _shown(services: Services, found: Validation) -> ValidationOut:
    subject, finding = found.subject, found.finding or Finding()
    return ValidationOut(
        id=found.id,
        state=_state(found),
        run=subject.run,
        average=subject.average,
        version=subject.version,
        step=subject.step,
        task=found.task,
        created=found.created,
        metrics=finding.metrics,
        error=finding.error,
        samples=finding.samples,
        seconds=finding.seconds,
        worker=found.worker or found.leased_to,
        at=found.at,
        note=_note(services, found),
    )


def _state(found: Validation) -> Literal["waiting", "running", "done", "failed"]:
    if found.finding is None:
        return "waiting" if found.leased_to is None else "running"
    return "done" if found.finding.error is None else "failed"


def _note(services: Services, found: Validation) -> str | None:
    """Why nobody is at it; None when somebody is or will be."""
    subject = found.subject
    if _state(found) != "waiting" or services.validations.has_worker(subject.run, subject.average, found.task):
        return None
    if services.evaluator is not None and services.evaluator.task == found.task:
        return services.evaluator.state()
    return f"no worker asks for the task {found.task!r} any more: start one with: ema evaluate module:function"
