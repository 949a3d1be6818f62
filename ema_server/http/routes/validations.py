"""Validations: ask for the evaluation of a version, get its state, or wait until it has ended."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.responses import Response

from ema_server.evaluation.leases import Finding, Validation
from ema_server.evaluation.scheduler import subject_of
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, relative_link
from ema_server.http.routes.metrics import store_errors
from ema_server.http.schemas import Name, Out, ProblemOut
from ema_server.http.services import Services, ServicesDep
from ema_server.storage.catalog import Version

WAIT_S_MAX = 60  # usually below the timeouts of proxies
_POLL_S = 0.2  # a poll is one indexed row read by the database's thread
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})")

router = APIRouter(prefix="/v1/runs/{run}/validations", tags=["validations"])


class ValidationIn(BaseModel):
    """Which version to evaluate. `again`: even if it has metrics for the task."""

    model_config = ConfigDict(extra="forbid")

    average: Name
    rev: Annotated[str, StringConstraints(min_length=1, max_length=60)] = "latest"
    task: Name = "default"
    again: bool = False


class ValidationOut(Out):
    """A validation: `metrics` once it is done, `error` once it has failed; `note` says why no worker evaluates it.

    `missing` has the metrics without a finite value, each with the reason.
    """

    id: str
    state: Literal["waiting", "running", "done", "failed"]
    run: str
    average: str
    version: str
    step: int
    task: str
    created: str
    metrics: dict[str, float]
    missing: dict[str, str]
    error: str | None
    samples: int | None
    seconds: float | None
    worker: str | None
    at: str | None
    note: str | None


@router.post(
    "",
    name="request",
    operation_id="request_validation",
    status_code=202,
    responses={
        200: {"model": ValidationOut, "description": "The version has metrics for the task"},
        503: {
            "model": ProblemOut,
            "description": "No evaluation worker is available; the detail says how to start one",
        },
    },
)
async def ask(
    run: str, body: ValidationIn, request: Request, response: Response, services: ServicesDep
) -> ValidationOut:
    """Request the evaluation of a version. Location is the address of its result."""
    version = find_version(services, run, body.average, body.rev)
    possible = _is_served(services, body.task) or services.validations.has_worker(subject_of(version), body.task)
    with store_errors():
        found = await services.validations.request(version, body.task, again=body.again, possible=possible)
    if found is None:
        raise Problem(Code.NO_EVALUATOR, _how_to_start(services, version, body.task))
    response.headers["Location"] = relative_link(request, f"/v1/runs/{found.subject.run}/validations/{found.id}")
    if found.finding is not None:
        response.status_code = 200
    return _shown(services, found)


@router.get("/{id}", operation_id="get_validation")
async def get(
    run: str, id: str, response: Response, services: ServicesDep, prefer: Annotated[str | None, Header()] = None
) -> ValidationOut:
    """The state of a validation. With `Prefer: wait=SECONDS` (at most 60) the answer waits until it has ended."""
    response.headers["Cache-Control"] = "no-store"
    preferred = _WAIT.search(prefer or "")
    wait_s = 0 if preferred is None else min(int(preferred[1]), WAIT_S_MAX)
    if preferred is not None:
        response.headers["Preference-Applied"] = f"wait={wait_s}"
    deadline = time.monotonic() + wait_s
    while True:
        found = await _find(services, run, id)
        left_s = deadline - time.monotonic()
        if found.finding is not None or left_s <= 0 or services.stopping.is_set():
            return _shown(services, found)
        await asyncio.sleep(min(_POLL_S, left_s))


async def _find(services: Services, run: str, validation_id: str) -> Validation:
    with store_errors():
        found = await services.validations.find(run, validation_id)
    if found is None:
        detail = f"run {run!r} has no validation {validation_id[:60]!r}; POST …/runs/{run}/validations asks for one"
        raise Problem(Code.VALIDATION_NOT_FOUND, detail)
    return found


def _is_served(services: Services, task: str) -> bool:
    """Whether the server has an evaluator of its own for the task."""
    return services.evaluator is not None and services.evaluator.task == task


def _how_to_start(services: Services, version: Version, task: str) -> str:
    others = services.validations.tasks()
    known = f" (there are workers for {', '.join(map(repr, others))})" if others else ""
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
        missing=finding.missing,
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
    """Why no worker evaluates it; None if one does or will."""
    subject = found.subject
    if _state(found) != "waiting" or services.validations.has_worker(subject, found.task):
        return None
    if services.evaluator is not None and services.evaluator.task == found.task:
        return services.evaluator.state()
    return f"no worker asks for the task {found.task!r} now: start one with: ema evaluate module:function"
