"""Who may ask: one bearer token for everything but the two health checks. Pure ASGI, so that bodies stream through.

Knows nothing of routes. The token is compared in constant time and never logged.
"""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ema_server.http.problems import Code, Problem, problem_response

OPEN_PATHS = frozenset({"/healthz", "/readyz"})


class BearerAuth:
    """ASGI middleware that answers 401 unless the request carries `Authorization: Bearer {token}`."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        detail = "send the header 'Authorization: Bearer TOKEN' (clients of this project: --token or EMA_TOKEN)"
        problem = Problem(Code.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})
        await problem_response(problem, scope)(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), self._token)
