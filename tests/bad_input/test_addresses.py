"""Names that escape a folder or break a URL: a problem, never a file, a traceback or a redirect elsewhere."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from ema_cli.app import build, run
from ema_proto.errors import LocalProtocolError
from ema_proto.names import check_name
from ema_reader import Reader, ReaderError
from support.served import Served

WAIT_S = 30.0
SECRET = b"a secret of another program"
NAMES = [
    "..",
    ".",
    "../../secret",
    "..%2f..%2fsecret",
    "..\\..\\secret",
    "/etc/passwd",
    "a/b",
    "a b",
    "a?b",
    "a#b",
    "a%b",
    "a;b",
    "a\nb",
    "a\0b",
    "\u00fc",
    "\u202egnp",
    "\U0001f600",
    "",
    "-x",
    "x-",
    "v1",
    "CON" * 33,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("addresses")
    (place / "secret").write_bytes(SECRET)
    served = Served(place / "data")
    (place / "data" / "secret").write_bytes(SECRET)
    served.publish("digits", 1, ["raw"])
    served.beat()
    yield served
    served.close()


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    with served.listening() as url:
        yield url


def ask(url: str, method: str, target: bytes) -> tuple[int, bytes]:
    """Status and body for a raw request line, which HTTP libraries would normalize."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(method.encode() + b" " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"location" not in head.lower()
    return int(head.split()[1]), body


_UP = [b"..", b"%2e%2e", b"%2E.", b"..%2f..", b"..%5c..", b"%252e%252e", b"..%c0%af", b"....//", b"%00", b".%00."]


@pytest.mark.parametrize("up", _UP)
@pytest.mark.parametrize(
    "path",
    [
        b"/%s/secret",
        b"/v1/runs/%s/secret",
        b"/v1/runs/digits/averages/%s/versions",
        b"/v1/runs/digits/averages/raw/versions/%s",
        b"/v1/runs/digits/averages/raw/versions/latest/files/%s%%2fsecret",
        b"/v1/runs/digits/averages/raw/versions/%(id)s/files/%(up)s%%2f%(up)s%%2fsecret",
        b"/v1/runs/digits/averages/raw/versions/%(id)s/files/%(up)s",
    ],
)
def test_path_traversal_is_a_problem_without_file_content(served: Served, url: str, path: bytes, up: bytes) -> None:
    version = served.catalog.versions("digits", "raw")[0].id.encode()
    target = path % ({b"id": version, b"up": up} if b"%(" in path else up)

    for method in ("GET", "HEAD"):
        status, body = ask(url, method, target)
        assert 400 <= status < 500, (target, status)
        assert SECRET not in body


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/runs/" + b"n" * 30_000,
        b"/v1/runs/%ff%fe",
        b"/v1/runs/%",
        b"/v1/runs/\xc3\xbc",
        b"/v1/runs//averages//versions",
        b"//v1/runs",
        b"/v1/runs/digits/averages/raw/versions/step-" + b"9" * 5000,
        b"/v1/runs/digits/averages/raw/versions/step--1",
        b"/v1/runs/digits/averages/raw/versions/" + b"g" * 40,
        b"http://elsewhere/secret",
        b"*",
        b"secret",
    ],
)
def test_malformed_url_is_a_client_error(url: str, target: bytes) -> None:
    status, body = ask(url, "GET", target)

    assert 400 <= status < 500, (target[:60], status, body[:200])
    assert b"Traceback" not in body
    if body.startswith(b"{"):
        assert json.loads(body)["status"] == status


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_invalid_run_or_average_name_is_refused_by_the_reader(url: str, name: str) -> None:
    with Reader(url) as reader:
        for ask_for in (
            lambda: reader.run(name),
            lambda: reader.versions("digits", name),
            lambda: reader.versions(name, "raw"),
            lambda: reader.version("digits", "raw", name),
        ):
            with pytest.raises(ReaderError) as caught:
                ask_for()
            assert caught.value.exit_code in (2, 3), caught.value


@pytest.mark.parametrize("name", [name for name in NAMES if "\0" not in name and "/" not in name and name], ids=ascii)
def test_invalid_name_on_the_command_line_makes_no_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, url: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ema", "download", "--url", url, "--", f"{name}/raw"])

    assert run(build()) in (2, 3)
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_trainer_refuses_invalid_names(name: str) -> None:
    with pytest.raises(LocalProtocolError):
        check_name("run", name)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0" * 100 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
        b"POST /v1/runs/digits/versions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/runs/digits/versions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/runs\r\nHost x\r\n: :\r\n\r\n",
    ],
)
def test_non_http_bytes_are_refused_and_others_are_served(url: str, request_bytes: bytes) -> None:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(request_bytes)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
    with Reader(url) as reader:
        assert [run.run for run in reader.runs()] == ["digits"]


_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"metrics": {}}',
    b'{"metrics": {"a": NaN}}',
    b'{"metrics": {"a": 1e999}}',
    b'{"metrics": {"a": "x"}}',
    b'{"metrics": {"\\ud800": 1}}',
    b'{"metrics": {"a": 1}, "samples": 1e400}',
    b'{"metrics": {"a": 1}, "seconds": -1}',
    b'{"metrics": {"a": 1}, "task": "' + b"t" * 5000 + b'"}',
]


@pytest.mark.parametrize("body", _BODIES, ids=lambda body: ascii(body[:40]))
def test_invalid_metrics_report_is_a_problem_with_its_location(served: Served, url: str, body: bytes) -> None:
    version = served.catalog.versions("digits", "raw")[0].id
    address = f"{url}/v1/runs/digits/averages/raw/versions/{version}/metrics"
    answer = httpx2.post(address, content=body, headers={"Content-Type": "application/json"}, timeout=WAIT_S)

    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]
