"""Sends clients of the Hugging Face Hub on to another Hub for what is not a run of this server."""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

_METHODS = frozenset({"GET", "HEAD", "POST"})  # POST asks for information about paths
_API = re.compile(r"/api/(models|datasets|spaces)/([^/]+)")
_FILE = re.compile(r"/([^/]+)(?:/[^/]+){0,2}/(?:resolve|raw)/")
_OTHER_KINDS = frozenset({"datasets", "spaces"})


def repository_owner(path: str) -> str | None:
    """The first part of the name of the repository that a path of the Hub's protocol is about.

    None if the path is not of that protocol, empty if it is about a data set or a space, which this server has none of.
    """
    if match := _API.match(path):
        return "" if match[1] in _OTHER_KINDS else match[2]
    if (match := _FILE.match(path)) and match[1] not in ("v1", "api"):
        return "" if match[1] in _OTHER_KINDS else match[1]
    return None


class HubUpstream:
    """Answers 307 to another Hub for repositories whose owner is not a run.

    Args:
        app: the application.
        url: the other Hub, `https://HOST`.
        is_run: whether a run of this name exists, or has existed.
    """

    def __init__(self, app: ASGIApp, url: str, is_run: Callable[[str], bool]) -> None:
        self._app = app
        self._url = url.rstrip("/")
        self._is_run = is_run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in _METHODS:
            owner = repository_owner(scope["path"])
            if owner is not None and not (owner and self._is_run(owner)):
                query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
                location = f"{self._url}{scope['raw_path'].decode('latin-1')}{query}"
                headers = {"Location": location, "Cache-Control": "no-cache"}
                await Response(status_code=307, headers=headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)
