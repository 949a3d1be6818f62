"""How much a request may carry: bodies above the limit are refused before they are read. Pure ASGI."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_server.http.problems import Code, Problem

BODY_BYTES_MAX = 1 << 20  # a thousand metrics with long names are under 300 KiB


class BodyLimit:
    """ASGI middleware that answers 413 to a body above `BODY_BYTES_MAX`, announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY_BYTES_MAX or (announced.isdecimal() and int(announced) > BODY_BYTES_MAX):
                raise Problem(Code.BODY_TOO_LARGE, f"a body may have {BODY_BYTES_MAX} bytes")
            return message

        await self._app(scope, bounded, send)
