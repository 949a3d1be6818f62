"""Routes for whoever wants a version validated now: ask for it, and look at it or wait until it is done."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from ema_server.http.routes.lease_schemas import ValidationIn, ValidationOut
from ema_server.http.routes.validate import ask, look, wait
from ema_server.http.schemas import ProblemOut
from ema_server.http.services import Services

WAIT_S_MAX = 60  # below the patience of proxies, usually
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})")


def router(services: Services) -> APIRouter:
    """`/v1/runs/{run}/validations` and `…/{id}`."""
    routes = APIRouter(prefix="/v1/runs/{run}/validations", tags=["validations"])

    @routes.post(
        "",
        operation_id="request_validation",
        status_code=202,
        responses={
            200: {"model": ValidationOut, "description": "The version has metrics for the task: nothing to do"},
            503: {"model": ProblemOut, "description": "Nobody evaluates here; the detail says how to start a worker"},
        },
    )
    async def request(run: str, body: ValidationIn, response: Response) -> ValidationOut:
        """Have a version evaluated. Location says where the result will be."""
        found = await ask(services, run, body)
        response.headers["Location"] = f"/v1/runs/{found.run}/validations/{found.id}"
        if found.state in ("done", "failed"):
            response.status_code = 200
        return found

    @routes.get("/{id}", operation_id="get_validation")
    async def get(
        run: str, id: str, response: Response, prefer: Annotated[str | None, Header()] = None
    ) -> ValidationOut:
        """How it stands. With `Prefer: wait=SECONDS` (at most 60) the answer waits until it has ended."""
        response.headers["Cache-Control"] = "no-store"
        wanted = _WAIT.search(prefer or "")
        if wanted is None:
            return await look(services, run, id)
        wait_s = min(int(wanted[1]), WAIT_S_MAX)
        response.headers["Preference-Applied"] = f"wait={wait_s}"
        return await wait(services, run, id, wait_s)

    return routes
