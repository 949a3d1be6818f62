"""How many requests were answered, by route and status. Comes in: ASGI traffic; goes out: a copy of the counts."""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestCounts:
    """Counts by (route template, status). Written on the event loop's thread only."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, int]] = Counter()

    def add(self, route: str, status: int) -> None:
        """Count one response."""
        self._counts[route, status] += 1

    def all(self) -> dict[tuple[str, int], int]:
        """A copy of the counts."""
        return dict(self._counts)


class CountRequests:
    """ASGI middleware that counts each response under its route's template, never under the address asked for."""

    def __init__(self, app: ASGIApp, counts: RequestCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts.add(getattr(scope.get("route"), "path", "none"), message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
