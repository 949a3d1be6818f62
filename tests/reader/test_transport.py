"""Proxies and TLS variables of the environment, and answers of something other than an ema server: mapped errors."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader import Reader, ReaderError, Unauthorized, Unreachable, transport
from ema_reader.errors import UsageError
from support.served import WAIT_S, Served

_PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
_TLS = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_ELSEWHERE = "http://198.51.100.7:8080"  # TEST-NET-2: no such server
_COMMANDS = [
    ["status"],
    ["versions", "r"],
    ["metrics", "r"],
    ["best", "r"],
    ["download", "r/raw"],
    ["evaluate", "json:dumps", "--run", "r"],
    ["validate", "r/raw"],
    ["recalibrate", "r/raw", "--bn", "json:dumps"],
    ["averages", "r"],
    ["ledger", "r/raw"],
    ["synthesize", "r", "--sigma-rel", "0.1"],
]
_ONCE = [arguments for arguments in _COMMANDS if arguments[0] != "evaluate"]  # which waits for an absent server


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_PROXIES, *_TLS):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def _answering(status: int, body: bytes, headers: dict[str, str]) -> Iterator[str]:
    """A server with one answer to every request."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response_only(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(WAIT_S)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1", "nonsense://x", "http://[::1"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_loopback_never_uses_a_proxy(
    monkeypatch: pytest.MonkeyPatch, served: Served, url: str, variable: str, proxy: str
) -> None:
    served.beat()
    monkeypatch.setenv(variable, proxy)

    for host in ("127.0.0.1", "localhost"):
        with Reader(url.replace("127.0.0.1", host), token="") as reader:
            assert reader.ready()[0]
    assert CliRunner().invoke(build(), ["healthcheck", "--url", url]).exit_code == 0


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("192.168.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_addresses_are_recognised(host: str, is_here: bool) -> None:
    assert transport._is_this_machine(host) is is_here


@pytest.mark.parametrize(
    ("proxy", "text"), [("socks5://127.0.0.1:1", "socksio"), ("nonsense://x:1", "scheme"), ("http://[::1", "port")]
)
@pytest.mark.parametrize("arguments", [["healthcheck"], *_COMMANDS], ids=lambda arguments: arguments[0])
def test_unusable_proxy_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], proxy: str, text: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    if "socks" in proxy:
        monkeypatch.setitem(__import__("sys").modules, "socksio", None)

    done = CliRunner().invoke(build(), [*arguments, "--url", _ELSEWHERE])

    assert done.exit_code == (1 if arguments == ["healthcheck"] else 2)
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)
    assert "ALL_PROXY" in done.stderr
    assert text in done.stderr.lower()


def test_host_in_no_proxy_does_not_depend_on_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://x:1")
    monkeypatch.setenv("NO_PROXY", "example.org,198.51.100.7")

    with Reader(_ELSEWHERE, token="") as reader:
        assert reader._transport._proxies == []


def test_silent_proxy_is_unreachable_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    with Reader(_ELSEWHERE, token="") as reader, pytest.raises(Unreachable, match=r"through the proxy of HTTP_PROXY"):
        reader.runs()


def test_other_hosts_are_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with _answering(200, b'{"runs": []}', {"Content-Type": "application/json"}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with Reader(_ELSEWHERE, token="") as reader:
            assert reader.runs() == ()


@pytest.mark.parametrize("variable", _TLS)
@pytest.mark.parametrize("arguments", [["healthcheck"], *_ONCE], ids=lambda arguments: arguments[0])
def test_invalid_tls_variable_is_ignored_for_plain_http(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], variable: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "nowhere" / "file"))

    done = CliRunner().invoke(build(), [*arguments, "--url", "http://127.0.0.1:1"])

    assert done.exit_code == (1 if arguments == ["healthcheck"] else 5), done.stderr
    assert "nothing answers at http://127.0.0.1:1" in done.stderr
    assert "Errno 2]" not in done.stderr


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_unreadable_certificates_are_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "certificates.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))

    with pytest.raises(UsageError, match=f"SSL_CERT_FILE={path}"):
        Reader("https://127.0.0.1:1")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "bearer tokens"),
        (403, "access rule"),
        (404, "is the address right"),
        (413, "client_max_body_size"),
        (431, "headers"),
        (500, "failure"),
        (502, "does not answer"),
        (504, "time limit"),
        (418, "a teapot"),
    ],
)
def test_proxy_error_page_is_one_line_with_its_sender_and_meaning(status: int, text: str) -> None:
    page = b"<html><head><title>no</title><style>p {}</style></head>\r\n<body><p>a teapot</p></body></html>"
    with (
        _answering(status, page, {"Content-Type": "text/html", "Server": "nginx/1.22.1"}) as url,
        Reader(url) as reader,
    ):
        for ask in (reader.runs, lambda: reader.averages.add("r", "ema:0.9"), lambda: list(reader.ready())):
            with pytest.raises(ReaderError) as caught:
                ask()
            message = str(caught.value)
            assert f"answers {status}" in message
            assert "nginx/1.22.1" in message
            assert text in message
            assert "<" not in message
            assert isinstance(caught.value, Unreachable) == (status in (502, 504))


def test_redirect_to_another_server_is_named() -> None:
    with (
        _answering(401, b'{"title": "t", "detail": "d", "code": "unauthorized"}', {}) as target,
        _answering(301, b"", {"Location": f"{target}/v1/runs"}) as url,
        Reader(url, "secret") as reader,
        pytest.raises(Unauthorized, match=f"it redirects to {target}: use that address"),
    ):
        reader.runs()


def test_missing_and_wrong_token_are_distinguished(tmp_path: Path) -> None:
    served = Served(tmp_path / "data", token="s3cret")
    with served.listening() as url:
        with Reader(url, token="") as reader, pytest.raises(Unauthorized, match="requires a token, and none was given"):
            reader.runs()
        with Reader(url, token="guess") as reader, pytest.raises(Unauthorized, match="does not accept this token"):
            reader.runs()
    served.close()


def test_trainer_port_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    zmq = pytest.importorskip("zmq")
    monkeypatch.setattr(transport, "_timeout", lambda _: httpx2.Timeout(0.3))
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with Reader(f"http://127.0.0.1:{port}", token="") as reader:
            with pytest.raises(UsageError, match="the address for trainers"):
                reader.runs()
            with pytest.raises(UsageError, match="the address for trainers"):
                reader.ready()
    finally:
        router.close(0)
        context.term()


def test_silent_server_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_timeout", lambda _: httpx2.Timeout(0.3))
    monkeypatch.setattr(transport, "_GREETING_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Reader(url, token="") as reader, pytest.raises(Unreachable, match="no answer in time"):
            reader.runs()
