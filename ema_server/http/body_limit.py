"""How much a request may carry: bodies above the limit are refused before they are read. Pure ASGI."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_server.derived.recalibration import BUFFERS_BYTES_MAX
from ema_server.http.problems import Code, Problem, problem_response

BODY_BYTES_MAX = 1 << 20  # a thousand metrics with long names are under 300 KiB
UPLOAD = "recalibrate"  # how the one address ends that takes tensors


def bytes_max(path: str) -> int:
    """How many bytes a body for this address may have."""
    return BUFFERS_BYTES_MAX if path.endswith(f"/{UPLOAD}") else BODY_BYTES_MAX


class BodyLimit:
    """ASGI middleware that answers 413 to a body above `bytes_max`, announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        allowed, received = bytes_max(scope["path"]), 0
        too_large = Problem(Code.BODY_TOO_LARGE, f"a body may have {allowed} bytes here")
        if announced.isdecimal() and int(announced) > allowed:
            await problem_response(too_large, scope)(scope, receive, send)
            return

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > allowed:
                raise too_large
            return message

        await self._app(scope, bounded, send)
