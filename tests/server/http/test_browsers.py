"""What a web page can make a visitor's browser send: it neither reads under a name of its own nor writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ema_server.config import ServerConfig
from ema_server.http.app import create_app
from ema_server.http.browsers import AllowedHosts
from ema_server.server import build

LEASE = {"worker": "w"}


@contextmanager
def serving(data: Path, *, token: str | None = None, allowed_hosts: str = "") -> Iterator[TestClient]:
    server = build(ServerConfig(data, token=token, allowed_hosts=allowed_hosts, kernel="torch"))
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with TestClient(create_app(server.services), headers=headers) as client:
        yield client
    server.close()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving(tmp_path / "data") as client:
        yield client


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8080", "LOCALHOST", "localhost.", "run.localhost:1", "ema:8080", ""),
        *("127.0.0.1:8080", "10.0.0.7", "[::1]:8080", "[::1]"),
    ],
)
def test_local_names_and_addresses_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/v1/runs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8080", "EVIL.example", "evil.example.", "evillocalhost.example", "1.2.3.4.5"),
        *("127.0.0.1.evil.example", "localhost.evil.example", "[::1].evil.example", "[evil.example]"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/runs"), ("GET", "/healthz"), ("DELETE", "/v1/runs/a")])
def test_other_names_are_refused_without_a_token(client: TestClient, method: str, path: str, host: str) -> None:
    response = client.request(method, path, headers={"Host": host})

    assert (response.status_code, response.json()["code"]) == (403, "host_not_allowed")
    assert repr(host) in response.json()["detail"]


def test_any_name_is_answered_with_a_token(tmp_path: Path) -> None:
    with serving(tmp_path / "data", token="s3cret") as client:
        assert client.get("/v1/runs", headers={"Host": "gpu1.example.org"}).status_code == 200


@pytest.mark.parametrize("token", [None, "s3cret"])
@pytest.mark.parametrize(
    ("host", "status"),
    [("ema.example.org", 200), ("a.b.example.net", 200), ("example.net", 403), ("gpu1.example.org", 403), ("ema", 200)],
)
def test_names_can_be_allowed(tmp_path: Path, token: str | None, host: str, status: int) -> None:
    with serving(tmp_path / "data", token=token, allowed_hosts="ema.example.org,*.example.net") as client:
        assert client.get("/v1/runs", headers={"Host": host}).status_code == status


def test_every_name_can_be_allowed() -> None:
    assert AllowedHosts.of("*", None).admit("evil.example")


@pytest.mark.parametrize("names", ["a b", "http://a", "a,,b", "*.", "a/b"])
def test_malformed_names_are_refused(tmp_path: Path, names: str) -> None:
    with pytest.raises(ValueError, match=r"allowed_hosts is .*: use names such as"):
        ServerConfig(tmp_path, allowed_hosts=names)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://localhost:8080"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:8080"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_pages_of_other_sites_do_not_write(client: TestClient, headers: dict[str, str], status: int) -> None:
    headers = {"Host": "localhost:8080"} | headers

    response = client.post("/v1/leases", json=LEASE, headers=headers)

    assert response.status_code == status, response.text
    assert status == 200 or response.json()["code"] == "cross_site"
    assert client.get("/v1/runs", headers=headers).status_code == 200, "reading is harmless: the page gets no answer"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in ("/v1/runs", "/nothing", "/healthz", "/metrics")),
        *((method, "/v1/runs") for method in ("PUT", "OPTIONS")),
    ],
)
def test_responses_may_not_be_run_or_read_by_other_sites(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path, headers={"Origin": "http://testserver"})

    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not any(name.startswith("access-control-") for name in response.headers)
