"""Every command and method behind a reverse proxy that serves the server under a path prefix."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader import Reader, ReaderError
from ema_server.runs.status_store import RunState
from support.served import WAIT_S, Served

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
        location {prefix}/ {{ proxy_pass {upstream}/; }}
    }}
}}
"""


@contextmanager
def _stripping(upstream: str, folder: Path) -> Iterator[str]:
    """A proxy that removes the prefix and forwards the rest."""
    address = urlsplit(upstream)

    class Strip(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{_PREFIX}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(str(address.hostname), address.port, timeout=WAIT_S)
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
            thread.join(WAIT_S)


@contextmanager
def _nginx(upstream: str, folder: Path) -> Iterator[str]:
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
        process.wait(WAIT_S)


def _await(listen: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx2.get(f"http://{listen}/", trust_env=False)
        except httpx2.ConnectError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError("nginx did not start")


@pytest.fixture(params=[_stripping, _nginx], ids=["strip", "nginx"])
def behind(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of the server behind a proxy."""
    proxy: Callable[[str, Path], AbstractContextManager[str]] = request.param
    with proxy(url, tmp_path / "proxy") as address:
        yield address


@pytest.mark.process
def test_every_method_works_behind_a_prefix(served: Served, behind: str, tmp_path: Path) -> None:
    served.publish("digits", 100)
    served.beat()

    with Reader(f"{behind}/", token="") as reader:
        version = reader.version("digits", "ema-0.9", "step-100")  # an alias: answered by a redirect
        reader.report(version, {"accuracy": 0.9})
        folder = reader.download(version, tmp_path / "out")

        assert reader.ready()[0]
        assert [run.run for run in reader.runs()] == ["digits"]
        assert reader.wait("digits", "ema-0.9", timeout_s=WAIT_S) == version
        assert reader.best("digits").version == version
        assert sorted(reader.load("digits/ema-0.9")) == ["bias", "weight"]
        assert reader.validate("digits", "ema-0.9", timeout_s=WAIT_S).metrics == {"accuracy": 0.9}
        assert (folder / "version.json").is_file()


def _write_ledger(path: Path) -> None:
    ledger = {"origin": 0, "set": [1], "ranges": [[1, 100, 1]]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "ledger": ledger, "paces": []}))


@pytest.mark.process
def test_every_command_works_behind_a_prefix(
    served: Served, behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = served.publish("digits", 100).versions[0]
    served.show("digits", 100, ["ema-0.9"], RunState.FINISHED)
    served.beat()
    (tmp_path / "behind_a_prefix.py").write_text("def evaluate(state): return {'bias': state['bias'][0]}")
    monkeypatch.chdir(tmp_path)
    commands = [
        ["status", "digits"],
        ["versions", "digits"],
        ["evaluate", "behind_a_prefix:evaluate", "--run", "digits", "--averages", "all", "--poll-s", "0.05"],
        ["validate", "digits/ema-0.9@step-100"],
        ["metrics", "digits"],
        ["best", "digits", "--download", "best"],
        ["averages", "digits"],
        ["download", f"digits/ema-0.9@{version.id[:7]}"],
        ["healthcheck"],
        ["doctor"],
        ["ledger", "digits/ema-0.9"],  # last: its file is changed before
    ]

    for arguments in commands:
        if arguments[0] == "ledger":
            _write_ledger(version.folder / "version.json")
        done = CliRunner().invoke(build(), [*arguments, "--url", behind])
        assert done.exit_code == 0, (arguments, done.output)


@pytest.mark.process
def test_body_over_the_limit_of_nginx_is_an_error_that_names_its_setting(
    served: Served, url: str, tmp_path: Path
) -> None:
    served.publish("digits", 100)
    with _nginx(url, tmp_path / "proxy") as address, Reader(address, token="") as reader:
        metrics = {f"metric-{number}": 1.0 for number in range(200)}
        with pytest.raises(ReaderError, match=r"answers 413 .*\(nginx.*client_max_body_size"):
            reader.report("digits/ema-0.9", metrics)
