"""The ASGI application: routes, errors, and the middleware around them."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from ema_server.http import problems
from ema_server.http.browsers import AllowedHosts, HostHeader, SameSite, SecurityHeaders
from ema_server.http.middleware import BearerAuth, BodyLimit, RequestCounter
from ema_server.http.routes import (
    averages,
    blend,
    derived,
    files,
    health,
    hub,
    leases,
    ledgers,
    metrics,
    prometheus,
    recalibrate,
    runs,
    synthesize,
    validations,
    versions,
)
from ema_server.http.schemas import ProblemOut
from ema_server.http.services import Services
from ema_server.http.upstream import HubUpstream

API_VERSION = "1"
_ROUTES = (
    health,
    prometheus,
    runs,
    averages,
    ledgers,
    versions,
    files,
    synthesize,
    blend,
    recalibrate,
    derived,
    metrics,
    validations,
    leases,
    hub,
)
_PROBLEM = {"model": ProblemOut, "description": "Any error, as RFC 9457 problem+json"}


class Api(FastAPI):
    """FastAPI documents every model as application/json; errors here are problem+json."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            for path in super().openapi()["paths"].values():
                for operation in path.values():
                    _set_problem_type(operation["responses"])
        return super().openapi()


def create_api() -> Api:
    """The routes, which need no services until a request comes.

    The interactive documentation is off because it loads scripts from other hosts.
    """
    api = Api(
        title="ema-sidecar",
        version=API_VERSION,
        servers=[{"url": ".", "description": "Relative to this document, also behind a proxy that adds a prefix"}],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    problems.install(api)
    api.router.routes.extend(_routes())
    return api


@cache
def _routes() -> tuple[BaseRoute, ...]:
    """The routes of every application of this process. To analyse their signatures takes most of an app's creation."""
    router = APIRouter(responses={"default": _PROBLEM})
    for module in _ROUTES:
        router.include_router(module.router)
        _answer_head(router, module.router)
    return tuple(router.routes)


def create_app(services: Services) -> FastAPI:
    """The application over `services`.

    Middleware is pure ASGI and none of it compresses: both would slow downloads down, and compression would break
    their ranges and lengths.
    """
    api = create_api()
    api.state.services = services
    config = services.config
    if config.hub_upstream is not None:
        api.add_middleware(HubUpstream, url=config.hub_upstream, is_run=services.is_run)
    api.add_middleware(BodyLimit)
    if config.token is not None:
        api.add_middleware(BearerAuth, token=config.token)
    api.add_middleware(SameSite)
    api.add_middleware(HostHeader, allowed=AllowedHosts.of(config.allowed_hosts, config.token))
    api.add_middleware(SecurityHeaders)
    api.add_middleware(RequestCounter, counter=services.telemetry.http_requests)  # outermost: counts refusals too
    return api


def _answer_head(api: APIRouter, router: APIRouter) -> None:
    """Answer HEAD wherever `router` answers GET, which FastAPI does not do by itself."""
    routes = [(route, route.methods or ()) for route in router.routes if isinstance(route, APIRoute)]
    heads = {route.path for route, methods in routes if "HEAD" in methods}
    for route, methods in routes:
        if "GET" in methods and route.path not in heads:
            api.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                include_in_schema=False,
                response_model_exclude_none=route.response_model_exclude_none,
            )


def _set_problem_type(responses: dict[str, dict[str, Any]]) -> None:
    for response in responses.values():
        content = response.get("content", {})
        if content.get("application/json", {}).get("schema") == {"$ref": "#/components/schemas/ProblemOut"}:
            response["content"] = {problems.MEDIA_TYPE: content["application/json"]}
