"""The HTTP listener: a uvicorn server inside the caller's event loop.

The composition root handles signals: uvicorn would raise them again when it is done, and kill the process before the
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

from ema_server.addresses import bind_all, bracketed, numeric_hosts
from ema_server.http.connection import BoundedConnection

KEEP_ALIVE_S = 75  # above the usual polling intervals, so that a poll does not meet a connection being closed
GRACEFUL_S = 8  # below the ten seconds after which containers are killed
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_CUT_OFF_S = 2  # for the responses to notice

log = logging.getLogger(__name__)


class HttpListenError(Exception):
    """The address cannot be listened on."""


class HttpServer:
    """Serves `app` on `host:port` from `start` to `stop`.

    Args:
        app: the application.
        host: an address, or a name: each of its addresses is listened on.
        port: 0 takes a free one.
        graceful_s: how long running responses may take once `stop` is called.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, graceful_s: int = GRACEFUL_S) -> None:
        self._host = host
        self._port = port
        self._graceful_s = graceful_s
        self._server = _Server(_config(app, graceful_s))
        self._serving: asyncio.Task[None] | None = None
        self.own_url = ""  # where this machine reaches it, once it is started: a numeric address, and no wildcard

    async def start(self) -> str:
        """Listen, and return the URL.

        Raises:
            HttpListenError: the address is in use, or not one of this machine.
        """
        listeners = await asyncio.to_thread(_listen, self._host, self._port)
        self._serving = asyncio.create_task(self._server.serve(sockets=listeners))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)
        if self._serving.done():
            self._serving.result()
        numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        address, port = socket.getnameinfo(listeners[0].getsockname(), numeric)
        self.own_url = f"http://{bracketed(_LOOPBACK_OF.get(address, address))}:{port}"
        return f"http://{bracketed(self._host)}:{port}"

    def is_alive(self) -> bool:
        """Whether it accepts connections, since `start`."""
        return self._serving is not None and not self._serving.done()

    async def stop(self) -> None:
        """Let running responses end, at most `graceful_s`, and close."""
        self._server.should_exit = True
        if self._serving is None:
            return
        done, _ = await asyncio.wait({self._serving}, timeout=self._graceful_s)
        if not done:
            self._server.cut_off()
        await asyncio.wait({self._serving})
        if (error := self._serving.exception()) is not None:
            log.error("HTTP has died", exc_info=error)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def cut_off(self) -> None:
        """Close every connection; a response sees it as a client that has disconnected."""
        connections = list(self.server_state.connections)
        log.warning("%d connections are still open; they are closed", len(connections))
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The factory of the event loop: uvloop's if it is installed, else None for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _config(app: ASGIApp, graceful_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedConnection,
        lifespan="off",  # the composition root starts and stops the parts
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=graceful_s + _CUT_OFF_S,
    )


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of `host`, at one port."""
    try:
        return bind_all(numeric_hosts(host), port, _bind, socket.socket.close)
    except OSError as error:
        raise HttpListenError(
            f"cannot listen on http {bracketed(host)}:{port}: {error.strerror}; choose another --http"
        ) from error


def _bind(host: str, port: int) -> tuple[socket.socket, int]:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))  # `::` is IPv4 too
        listener.bind(address)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener, listener.getsockname()[1]
