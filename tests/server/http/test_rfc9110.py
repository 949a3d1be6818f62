"""Requirements of RFC 9110 and 9112 for every address: HEAD wherever GET is allowed, and a Host."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ema_server.storage.catalog import Version
from support.served import WAIT_S, Served

_PATHS = json.loads((Path(__file__).parents[3] / "proto" / "openapi.json").read_text())["paths"]
_READABLE = [path for path, operations in _PATHS.items() if "get" in operations]


@pytest.fixture
def version(served: Served) -> Version:
    served.beat()
    return served.publish("digits", 100).versions[0]


def _filled(path: str, version: Version) -> str:
    names = {"run": "digits", "average": "ema-0.9", "rev": version.id, "name": "version.json", "id": "0" * 32}
    names["path"] = names["name"]
    return re.sub(r"{(\w+)}", lambda match: names[match[1]], path)


@pytest.mark.parametrize("path", [*_READABLE, "/openapi.json"])
def test_head_is_answered_like_get_without_a_body(client: TestClient, version: Version, path: str) -> None:
    got, head = client.get(_filled(path, version)), client.head(_filled(path, version))

    assert head.status_code == got.status_code != 405
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    if "/metrics" not in path:  # which count these two requests
        assert head.headers.get("content-length") == got.headers.get("content-length")


def test_head_of_an_alias_is_redirected(client: TestClient, version: Version) -> None:
    path = "/v1/runs/digits/averages/ema-0.9/versions/latest"

    assert [client.head(f"{path}{rest}").status_code for rest in ("", "/ledger", "/files/version.json")] == [307] * 3


def test_head_does_not_record_a_download(client: TestClient, served: Served, version: Version) -> None:
    client.head(f"/v1/runs/digits/averages/ema-0.9/versions/{version.id}/files/model.safetensors")

    assert served.metrics.find("digits", "ema-0.9", version.id).result(WAIT_S) is None


def _status(url: str, request: bytes) -> int:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(request)
        return int(connection.recv(1 << 16).split()[1])


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\nhost:\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/runs HTTP/1.1\r\nAccept: */*\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    ],
)
def test_http_1_1_requires_exactly_one_host(url: str, request_head: bytes, status: int) -> None:
    assert _status(url, request_head) == status
