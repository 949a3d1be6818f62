"""Middleware: a bearer token, a limit on bodies, and a count of responses. Pure ASGI, so that bodies are streamed."""

from __future__ import annotations

import asyncio
import secrets

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_server.derived.recalibration import BUFFERS_BYTES_MAX
from ema_server.http.problems import Code, Problem, problem_response

IS_ADMITTED = "is_admitted"  # in the state of a request to a server with a token: whether it carries the token
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
BODY_BYTES_MAX = 1 << 20  # a thousand metrics with long names are under 300 KiB
BODY_S = 30.0
UPLOAD_S = 120.0  # 16 MiB at 140 kB/s
UPLOAD = "recalibrate"  # the last segment of the only path that accepts tensors


class BearerAuth:
    """Answers 401 unless the request carries `Authorization: Bearer {token}`; the health checks need none.

    The token is compared in constant time and never logged.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        admitted = self._admits(Headers(scope=scope))
        if admitted or scope["path"] in OPEN_PATHS:
            scope.setdefault("state", {})[IS_ADMITTED] = admitted
            await self._app(scope, receive, send)
            return
        detail = (
            "send the header 'Authorization: Bearer TOKEN' (clients of this project: --token or EMA_TOKEN; of the "
            "Hugging Face Hub: HF_TOKEN)"
        )
        problem = Problem(Code.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})
        await problem_response(problem, scope)(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), self._token)


def body_bytes_max(path: str) -> int:
    return BUFFERS_BYTES_MAX if path.endswith(f"/{UPLOAD}") else BODY_BYTES_MAX


def body_s_max(path: str) -> float:
    return UPLOAD_S if path.endswith(f"/{UPLOAD}") else BODY_S


class BodyLimit:
    """Bounds the bodies of requests.

    Answers 413 to a body above `body_bytes_max`, by its Content-Length or once that much has been received, and 408 to
    one that has not arrived `body_s_max` after it is first read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        allowed, received = body_bytes_max(scope["path"]), 0
        detail = f"the body is larger than the {allowed} bytes that this address accepts: send less at once"
        too_large = Problem(Code.BODY_TOO_LARGE, detail)
        if announced.isdecimal() and int(announced) > allowed:
            await problem_response(too_large, scope)(scope, receive, send)
            return

        deadline: float | None = None
        complete = False

        async def bounded() -> Message:
            nonlocal received, deadline, complete
            if complete:  # what comes next is the end of the connection
                return await receive()
            if deadline is None:
                deadline = asyncio.get_running_loop().time() + body_s_max(scope["path"])
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"the body has not arrived after {body_s_max(scope['path']):g} s: send it again"
                raise Problem(Code.UPLOAD_TIMEOUT, detail) from None
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > allowed:
                raise too_large
            return message

        await self._app(scope, bounded, send)


class RequestCounter:
    """Counts each response under its route's template, never under the path: labels must stay bounded."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self._app = app
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._counter.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
