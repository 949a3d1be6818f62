"""An HTTP server in the place of an inference engine: it records requests and answers as the test says."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_WAIT_S = 60.0


@dataclass
class Engine:
    """`requests` are path, body and Authorization; `answers` has status and body by path, others are 200 and `{}`.

    While `blocked` is set, requests to `/update_weights_from_disk` are recorded and not answered.
    """

    url: str
    requests: list[tuple[str, Any, str | None]] = field(default_factory=list)
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    blocked: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]

    def labels(self) -> list[str]:
        """The versions that SGLang was to load."""
        return [body["weight_version"] for path, body, _ in self.requests if path == "/update_weights_from_disk"]


@contextmanager
def engine(port: int = 0) -> Iterator[Engine]:
    """Serve on a (free) port."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
            made.requests.append((self.path, body, self.headers.get("Authorization")))
            if made.blocked.is_set() and self.path == "/update_weights_from_disk":
                made.released.wait(_WAIT_S)
                return
            status, answer = made.answers.get(self.path.partition("?")[0], (200, {}))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer) as server:
        made = Engine(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield made
        finally:
            made.released.set()
            server.shutdown()
            thread.join(_WAIT_S)
