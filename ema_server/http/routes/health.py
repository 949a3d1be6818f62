"""Routes for machines that watch the server: alive, ready, and what it counts."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ema_server.http.problems import Code, Problem
from ema_server.http.routes import prometheus
from ema_server.http.routes.readiness import check_all
from ema_server.http.schemas import HealthOut, ProblemOut, ReadyOut
from ema_server.http.services import Services


def router(services: Services) -> APIRouter:
    """`/healthz`, `/readyz` and `/metrics`."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz", operation_id="get_health")
    async def health() -> HealthOut:
        """The event loop answers. Does no I/O and needs no token."""
        return HealthOut()

    @routes.get("/readyz", operation_id="get_ready", responses={503: {"model": ProblemOut}})
    async def ready() -> ReadyOut:
        """Whether the server does its work, check by check. Needs no token; 503 when one of the checks fails."""
        checks = await check_all(services)
        failed = [f"{name}: {check.detail}" for name, check in checks.items() if not check.ok]
        if failed:
            extra = {"ready": False, "checks": {name: check.model_dump() for name, check in checks.items()}}
            raise Problem(Code.NOT_READY, "; ".join(failed), extra=extra)
        return ReadyOut(ready=True, checks=checks)

    @routes.get("/metrics", operation_id="get_prometheus", response_class=Response)
    async def metrics() -> Response:
        """Counters and gauges in Prometheus' text format."""
        return Response(prometheus.render(services), media_type=prometheus.MEDIA_TYPE)

    return routes
