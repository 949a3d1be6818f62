"""Middleware against web pages that use the visitor's browser to reach this server. Pure ASGI.

A browser sends requests for any page, from the machine that it runs on: a server on the loopback without a token must
not rely on the network to keep them away.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_server.http.problems import Code, Problem, problem_response

_ANY = "*"
_PORT = re.compile(r":[0-9]*$")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, section 9.2.1
_OWN_SITE = frozenset({"same-origin", "none"})  # none: the user entered the address


class AllowedHosts:
    """The names by which requests may address the server.

    Args:
        names: names, `*.DOMAIN` for all below a domain, `*` for any; compared without case and port.
        is_local: also allow what no page of another site can be served under: addresses, names without a dot, names
            below `localhost`, and the names of this machine.
    """

    def __init__(self, names: tuple[str, ...], *, is_local: bool) -> None:
        own = (socket.gethostname(), socket.getfqdn()) if is_local else ()
        self._exact = frozenset(name.lower() for name in (*names, *own))
        self._suffixes = tuple(name[1:].lower() for name in names if name.startswith("*."))
        self._is_local = is_local

    @classmethod
    def of(cls, names: str, token: str | None) -> AllowedHosts:
        """Those of the setting `allowed_hosts`.

        Without a token a page whose name resolves to this machine could read everything (DNS rebinding). It does not
        know a token.
        """
        given = tuple(name for name in names.split(",") if name)
        if not given and token is not None:
            given = (_ANY,)
        return cls(given, is_local=_ANY not in given)

    def admit(self, host: str) -> bool:
        """Whether a request with this Host header may be answered."""
        name = _name_of(host)
        return (
            _ANY in self._exact
            or name in self._exact
            or name.endswith(self._suffixes)
            or (self._is_local and (_is_address(name) or "." not in name or name.endswith(".localhost")))
        )


class HostHeader:
    """Answers 403 to a request for another name, and 400 to an HTTP/1.1 request without exactly one (RFC 9112, 3.2)."""

    def __init__(self, app: ASGIApp, allowed: AllowedHosts) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        app = self._app if problem is None else problem_response(problem, scope)
        await app(scope, receive, send)

    def _problem(self, scope: Scope) -> Problem | None:
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 and scope["http_version"] == "1.1":
            return Problem(Code.BAD_REQUEST, f"the request has {len(hosts)} Host headers: send one")
        refused = [host for host in hosts if not self._allowed.admit(host)]
        if not refused:
            return None
        return Problem(
            Code.HOST_NOT_ALLOWED,
            f"Host is {refused[0]!r}: address the server as localhost or by its IP address, start it with "
            f"--allowed-hosts {_name_of(refused[0])} (EMA_ALLOWED_HOSTS), or set a token",
        )


class SameSite:
    """Answers 403 to a browser's request that writes on behalf of a page of another site.

    Browsers say where a request comes from: in Sec-Fetch-Site, and older ones, or over plain HTTP between machines, in
    Origin alone. Other clients send neither.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS and _is_foreign(Headers(scope=scope)):
            detail = "a page of another site sent this request: use a page of this server, or another client"
            app = problem_response(Problem(Code.CROSS_SITE, detail), scope)
        await app(scope, receive, send)


class SecurityHeaders:
    """Adds headers to every response, unless it has them: a browser must not guess its type, run it or frame it."""

    _HEADERS = (
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def extended(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._HEADERS:
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, extended if scope["type"] == "http" else send)


def _is_foreign(headers: Headers) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in _OWN_SITE
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


def _name_of(host: str) -> str:
    """A Host header in lower case, without port, the brackets of an address, and the dot of a fully qualified name."""
    name = _PORT.sub("", host.strip().lower())
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name.removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
