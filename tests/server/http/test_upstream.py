"""`--hub-upstream`: which requests are sent on to another Hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ema_server.config import ServerConfig
from ema_server.http.app import create_app
from ema_server.http.upstream import repository_owner
from support.served import Served

UPSTREAM = "https://hub.example/prefix/"


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    served.publish("digits", 100)
    services = replace(served.services, config=replace(served.services.config, hub_upstream=UPSTREAM))
    with TestClient(create_app(services), follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        "/api/models/gpt2",
        "/api/models/org/model/revision/main",
        "/api/models/org/model/tree/refs%2Fpr%2F1?recursive=true&expand=false",
        "/api/datasets/digits/ema-0.9",
        "/api/spaces/org/space",
        "/gpt2/resolve/main/config.json",
        "/org/model/resolve/main/a%20b/c.json",
        "/org/model/raw/main/c.json",
        "/datasets/digits/ema-0.9/resolve/main/train.parquet",
        "/datasets/squad/resolve/main/train.parquet",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_repositories_are_redirected_with_path_and_query(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path)

    assert (response.status_code, response.headers["location"]) == (307, f"https://hub.example/prefix{path}")
    assert response.headers["cache-control"] == "no-cache"


def test_question_about_paths_is_redirected(client: TestClient) -> None:
    response = client.post("/api/models/org/model/paths-info/main", data={"paths": "config.json"})

    assert response.status_code == 307


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/models/digits/ema-0.9", 200),
        ("/digits/ema-0.9/resolve/main/model.safetensors", 307),
        ("/digits/ema-0.9/resolve/main/none", 404),
        ("/api/models/digits/none", 404),
        ("/api/agent-harnesses", 404),
        ("/v1/runs", 200),
        ("/v1/runs/resolve/averages", 404),
        ("/v1/resolve/main/x", 404),
        ("/nothing", 404),
    ],
)
def test_own_repositories_and_other_addresses_stay_here(client: TestClient, path: str, status: int) -> None:
    response = client.get(path)

    assert response.status_code == status
    assert "hub.example" not in response.headers.get("location", "")


def test_deleted_run_is_not_looked_for_elsewhere(client: TestClient, served: Served) -> None:
    served.catalog.delete("digits")
    served.statuses.delete("digits", "2026-01-01T00:00:00Z")

    assert client.get("/api/models/digits/ema-0.9").status_code == 404


def test_other_methods_are_not_redirected(client: TestClient) -> None:
    assert client.delete("/api/models/org/model").status_code == 405


def test_token_is_needed_before_anything_is_redirected(tmp_path: Path) -> None:
    served = Served(tmp_path / "data", token="secret")
    services = replace(served.services, config=replace(served.services.config, hub_upstream=UPSTREAM))
    with TestClient(create_app(services), follow_redirects=False) as client:
        assert client.get("/api/models/gpt2").status_code == 401
        assert client.get("/api/models/gpt2", headers={"Authorization": "Bearer secret"}).status_code == 307
    served.close()


def test_without_the_setting_nothing_is_redirected(served: Served) -> None:
    with TestClient(create_app(served.services), follow_redirects=False) as client:
        assert client.get("/api/models/gpt2").status_code == 404


@pytest.mark.parametrize("url", ["huggingface.co", "ftp://hub", "https://user@hub", "https://hub?x=1", ""])
def test_upstream_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="hub_upstream"):
        ServerConfig(hub_upstream=url)


@pytest.mark.parametrize(
    ("path", "owner"),
    [("/api/models/a/b", "a"), ("/a/b/resolve/c", "a"), ("/api/spaces/a/b", ""), ("/v1/runs", None), ("/api/x", None)],
)
def test_owner_is_the_first_part_of_a_repository(path: str, owner: str | None) -> None:
    assert repository_owner(path) == owner
