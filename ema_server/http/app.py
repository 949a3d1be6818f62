"""The ASGI application: routers, errors, and the middleware around them. Comes in: `Services`; goes out: an app."""

from __future__ import annotations

from fastapi import FastAPI

from ema_server.http import problems
from ema_server.http.description import DescribedApp
from ema_server.http.middleware import BearerAuth, BodyLimit, RequestCounter
from ema_server.http.routes import averages, derived, files, health, leases, metrics, runs, validations, versions
from ema_server.http.schemas import ProblemOut
from ema_server.http.services import Services

API_VERSION = "1"
_PROBLEM = {"model": ProblemOut, "description": "Any error, as RFC 9457 problem+json"}
_ROUTERS = (
    health,
    runs,
    averages,
    versions,
    files,
    derived,
    metrics,
    validations,
    leases,
)


def create_app(services: Services) -> FastAPI:
    """Build the application.

    Middleware is pure ASGI and none of it compresses: both would slow downloads down, and compression would break
    their ranges and lengths. The interactive documentation is off because it loads its scripts from other hosts.
    """
    app = DescribedApp(
        title="ema-sidecar",
        version=API_VERSION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": _PROBLEM},
    )
    problems.install(app)
    for module in _ROUTERS:
        app.include_router(module.router(services))
    app.add_middleware(BodyLimit)
    if services.token is not None:
        app.add_middleware(BearerAuth, token=services.token)
    app.add_middleware(RequestCounter, counter=services.telemetry.http_requests)  # outermost: counts refusals too
    return app
