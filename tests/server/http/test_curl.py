"""The same files to a real curl over a real socket: resumed, redirected, refused, cut off by a server that stops."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ema_server.http.app import create_app
from ema_server.http.listener import HttpListenError, HttpServer
from ema_server.storage.catalog import Version
from support.served import WAIT_S, Served

pytestmark = [pytest.mark.process, pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")]


@pytest.fixture
def version(served: Served) -> Version:
    return served.publish("digits", 100, size=200_000).versions[0]


@pytest.fixture
def content(version: Version) -> bytes:
    return (version.folder / "model.safetensors").read_bytes()


@pytest.fixture
def base(url: str) -> str:
    return f"{url}/v1/runs/digits/averages/ema-0.9/versions"


def curl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["curl", "-sS", "--max-time", str(WAIT_S), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT_S, check=False)


def test_curl_resumes_a_partial_file_of_a_version(base: str, version: Version, content: bytes, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(content[:1_000_003])

    done = curl(
        "-C", "-", "-o", target, "-w", "%{http_code} %{size_download}", f"{base}/{version.id}/files/{target.name}"
    )

    assert (done.returncode, done.stdout) == (0, f"206 {len(content) - 1_000_003}")
    assert target.read_bytes() == content


def test_curl_accepts_a_complete_file(base: str, version: Version, content: bytes, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(content)

    done = curl("-C", "-", "-o", target, "-w", "%{http_code}", f"{base}/{version.id}/files/{target.name}")

    assert (done.returncode, done.stdout) == (0, "416")
    assert target.read_bytes() == content


@pytest.mark.parametrize("follow", [["-L"], []])
def test_curl_does_not_resume_through_an_alias_and_keeps_the_partial_file(
    base: str, version: Version, tmp_path: Path, follow: list[str]
) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"another version")

    done = curl(*follow, "-C", "-", "-o", target, "-w", "%{http_code}", f"{base}/latest/files/{target.name}")

    assert done.returncode != 0
    assert done.stdout == "409"
    assert target.read_bytes() == b"another version"


def test_curl_follows_an_alias_to_the_immutable_address(
    base: str, version: Version, content: bytes, tmp_path: Path
) -> None:
    target = tmp_path / "model.safetensors"

    done = curl("-L", "-o", target, "-w", "%{url_effective}", f"{base}/step-100/files/{target.name}")

    assert done.stdout == f"{base}/{version.id}/files/{target.name}"
    assert target.read_bytes() == content


def test_curl_saves_a_file_under_the_name_of_its_version(base: str, version: Version, tmp_path: Path) -> None:
    curl("-L", "-O", "-J", "--output-dir", tmp_path, f"{base}/latest/files/model.safetensors")

    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["digits-ema-0.9-step-100.safetensors"]


def test_curl_gets_304_for_a_known_etag(base: str, version: Version, tmp_path: Path) -> None:
    address = f"{base}/{version.id}/files/model.safetensors"
    curl("--etag-save", tmp_path / "etag", "-o", tmp_path / "model", address)

    done = curl("--etag-compare", tmp_path / "etag", "-o", tmp_path / "again", "-w", "%{http_code}", address)

    assert done.stdout == "304"


def test_curl_gets_a_range_and_a_head(base: str, version: Version, content: bytes) -> None:
    address = f"{base}/{version.id}/files/model.safetensors"

    part = curl("-r", "0-7", "-o", "/dev/null", "-w", "%{http_code} %{size_download}", address)
    head = curl("-I", address)
    outside = curl("-r", "99999999999-", "-w", " %{http_code} %{content_type}", address)

    assert part.stdout == "206 8"
    assert f"content-length: {len(content)}" in head.stdout.lower()
    assert outside.stdout.endswith("416 application/problem+json")


def begin_download(url: str, version: Version) -> tuple[HTTPConnection, HTTPResponse]:
    address = urlsplit(url)
    connection = HTTPConnection(str(address.hostname), address.port, timeout=WAIT_S)
    connection.request("GET", f"/v1/runs/big/averages/ema-0.9/versions/{version.id}/files/model.safetensors")
    return connection, connection.getresponse()


def test_stop_waits_for_a_running_download(served: Served) -> None:
    version = served.publish("big", 1, size=4_000_000).versions[0]
    with served.listening() as url:
        connection, response = begin_download(url, version)
        parts = [response.read(1000)]
        rest = threading.Timer(0.3, lambda: parts.append(response.read()))
        rest.start()
    rest.join(WAIT_S)
    connection.close()

    assert b"".join(parts) == (version.folder / "model.safetensors").read_bytes()


def test_stalled_client_does_not_block_the_stop(served: Served) -> None:
    version = served.publish("big", 1, size=4_000_000).versions[0]
    with served.listening(graceful_s=1) as url:
        connection, response = begin_download(url, version)
        response.read(1000)

    with pytest.raises((ConnectionError, IncompleteRead)):
        response.read()
    connection.close()


def test_address_in_use_is_refused_with_what_to_do(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HttpListenError, match=f"127.0.0.1:{port}.*in use.*--http"):
            asyncio.run(HttpServer(create_app(served.services), "127.0.0.1", port).start())
