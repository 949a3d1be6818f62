"""Reverse proxies that serve a server under the path prefix `/team/ema`: a simple one, and a real nginx."""

from __future__ import annotations

import http.client
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from support.waiting import eventually

_WAIT_S = 60.0
_PREFIX = "/team/ema"
_NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
_CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    client_max_body_size 1k;
    server {{
        listen {listen};
        location {prefix}/ {{ proxy_pass {upstream}/; proxy_set_header X-Forwarded-Prefix {prefix}; }}
    }}
}}
"""


@contextmanager
def stripping(upstream: str, folder: Path) -> Iterator[str]:
    """A proxy that removes the prefix and forwards the rest."""
    address = urlsplit(upstream)

    class Strip(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{_PREFIX}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(str(address.hostname), address.port, timeout=_WAIT_S)
            upstream.request(self.command, self.path.removeprefix(_PREFIX), body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            upstream.close()

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Strip) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{_PREFIX}"
        finally:
            server.shutdown()
            thread.join(_WAIT_S)


@contextmanager
def nginx(upstream: str, folder: Path) -> Iterator[str]:
    """A real nginx; skips the test without one."""
    if _NGINX is None:
        pytest.skip("needs nginx")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as free:
        listen = f"127.0.0.1:{free.server_port}"
    folder.mkdir()
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, listen=listen, prefix=_PREFIX, upstream=upstream))
    process = subprocess.Popen([_NGINX, "-c", configuration, "-e", folder / "start.log"], stderr=subprocess.DEVNULL)
    try:
        _await(listen, process)
        yield f"http://{listen}{_PREFIX}"
    finally:
        process.terminate()
        process.wait(_WAIT_S)


def _await(listen: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert process.poll() is None, "nginx did not start"
        try:
            httpx2.get(f"http://{listen}/", trust_env=False)
        except httpx2.ConnectError:
            return False
        return True

    eventually(answers, "nginx answers", _WAIT_S)
