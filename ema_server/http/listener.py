"""The HTTP listener: a uvicorn server inside the caller's event loop. Knows an ASGI app and an address, nothing else.

Signals belong to the composition root: uvicorn would re-raise them when it is done, and kill the process before the
averages are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE_S = 75  # above the usual polling intervals: a client must not meet a connection that is just being closed
GRACEFUL_S = 8  # below the ten seconds after which containers are killed
_CUT_OFF_S = 2  # for the responses to notice

log = logging.getLogger(__name__)


class HttpListenError(Exception):
    """The address cannot be listened on."""


class HttpServer:
    """Serves `app` on `host:port` from `start` to `stop`.

    Args:
        app: the application.
        host: name or address to listen on.
        port: 0 takes a free one.
        graceful_s: how long running responses may take once `stop` is called.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, graceful_s: int = GRACEFUL_S) -> None:
        self._host = host
        self._port = port
        self._graceful_s = graceful_s
        self._server = _Server(_config(app, graceful_s))
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen, and return the URL.

        Raises:
            HttpListenError: the address is in use, or not one of this machine.
        """
        listener = await asyncio.to_thread(_listen, self._host, self._port)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)
        if self._serving.done():
            self._serving.result()
        return _url(listener.family, self._host, listener.getsockname()[1])

    async def stop(self) -> None:
        """Let running responses end, at most `graceful_s`, and close."""
        self._server.should_exit = True
        if self._serving is None:
            return
        done, _ = await asyncio.wait({self._serving}, timeout=self._graceful_s)
        if not done:
            self._server.cut_off()
        await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def cut_off(self) -> None:
        """Close every connection. To its response it looks like a client that went away."""
        connections = list(self.server_state.connections)
        log.warning("%d connections were still open; they are cut off", len(connections))
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop: uvloop where it is installed, else None for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _config(app: ASGIApp, graceful_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",  # start and stop have an owner: the composition root
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=graceful_s + _CUT_OFF_S,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise HttpListenError(f"cannot listen on http {host}:{port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise HttpListenError(
            f"cannot listen on http {host}:{port}: {error.strerror}; choose another --http"
        ) from error
    return listener


def _url(family: socket.AddressFamily, host: str, port: int) -> str:
    name = f"[{host}]" if family == socket.AF_INET6 and ":" in host else host
    return f"http://{name}:{port}"
