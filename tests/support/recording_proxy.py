"""A proxy that records requests, and can break one response off, or hold it."""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_WAIT_S = 60.0
_PIECE = 1 << 16


@dataclass
class Recorded:
    """The requests, as method, path and Range header.

    The next response ends after `break_after` bytes of its body, once; if `holds` is set, it stops there, and `held` is
    set, until `released` is.
    """

    url: str
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    break_after: int | None = None
    holds: bool = False
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@contextmanager
def recording(upstream: str) -> Iterator[Recorded]:
    """Forward every request to `upstream`."""
    address = urlsplit(upstream)

    class Forward(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            recorded.requests.append((self.command, self.path, self.headers.get("Range")))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server = http.client.HTTPConnection(str(address.hostname), address.port, timeout=_WAIT_S)
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            recorded.statuses.append(answer.status)
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() != "connection":
                    self.send_header(name, value)
            self.end_headers()
            self._send(answer)
            server.close()

        def _send(self, answer: http.client.HTTPResponse) -> None:
            limit = recorded.break_after
            if limit is not None and int(answer.headers.get("Content-Length", 0)) > limit and self.command == "GET":
                recorded.break_after = None
                self.wfile.write(answer.read(limit))
                if recorded.holds:
                    recorded.held.set()
                    recorded.released.wait(_WAIT_S)
                self.close_connection = True
                return
            while piece := answer.read(_PIECE):
                self.wfile.write(piece)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forward) as server:
        recorded = Recorded(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield recorded
        finally:
            recorded.released.set()
            server.shutdown()
            thread.join(_WAIT_S)
