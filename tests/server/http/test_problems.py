"""Every error is a problem: problem+json, with a detail for people and a code to branch on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ema_server.http.app import create_app
from ema_server.runs.status_store import RunState
from support.served import Served

VERSIONS = "/v1/runs/digits/averages/ema-0.9/versions"
NOWHERE = "0" * 40


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/runs/", 404, "not_found"),
        ("DELETE", "/v1/runs", 405, "method_not_allowed"),
        ("HEAD", "/v1/runs/nope", 404, "run_not_found"),
        ("GET", "/v1/runs/nope", 404, "run_not_found"),
        ("GET", "/v1/runs/nope/metrics", 404, "run_not_found"),
        ("POST", "/v1/runs/nope/versions", 404, "run_not_found"),
        ("GET", "/v1/runs/digits/averages/nope/versions", 404, "average_not_found"),
        ("GET", "/v1/runs/digits/averages/nope/versions/latest", 404, "average_not_found"),
        ("GET", f"{VERSIONS}/{NOWHERE}", 404, "version_not_found"),
        ("GET", f"{VERSIONS}/step-7", 404, "version_not_found"),
        ("GET", f"{VERSIONS}/newest", 404, "version_not_found"),
        ("GET", f"{VERSIONS}/latest/files/nope.bin", 404, "file_not_found"),
        ("GET", f"{VERSIONS}/latest/files/..%2f..%2fLOCK", 404, "not_found"),
        ("POST", f"{VERSIONS}/latest/metrics", 422, "invalid"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_error_is_a_problem_with_all_its_members(
    client: TestClient, served: Served, method: str, path: str, status: int, code: str
) -> None:
    served.publish("digits", 100)

    response = client.request(method, path)

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    if method != "HEAD":
        body = response.json()
        assert sorted(body) == ["code", "detail", "instance", "status", "title", "type"]
        assert (body["code"], body["status"]) == (code, status)
        assert body["type"].endswith(code)


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/runs", "GET, HEAD"),
        ("/v1/leases", "POST"),
        ("/openapi.json", "GET, HEAD"),
        ("/v1/runs/digits/averages", "GET, HEAD, POST"),
        ("/v1/runs/digits/averages/raw", "GET, HEAD, DELETE"),
        (f"{VERSIONS}/latest", "GET, HEAD, DELETE"),
        (f"{VERSIONS}/latest/files/model.safetensors", "GET, HEAD"),
    ],
)
def test_wrong_method_is_answered_with_the_allowed_methods(client: TestClient, path: str, allow: str) -> None:
    response = client.put(path)

    assert (response.status_code, response.headers["allow"]) == (405, allow)


def test_average_without_versions_asks_to_try_again(client: TestClient, served: Served) -> None:
    served.show("young", None, ["ema-0.9"], RunState.ACTIVE)

    response = client.get("/v1/runs/young/averages/ema-0.9/versions/latest")

    assert (response.status_code, response.json()["code"]) == (404, "no_version_yet")
    assert response.headers["retry-after"] == "5"
    assert client.get("/v1/runs/young/averages/ema-0.9/versions").json() == {"versions": []}


def test_unexpected_failure_is_a_problem_without_its_traceback(client: TestClient, served: Served) -> None:
    served.publish("digits", 100)

    response = client.post("/v1/runs/digits/versions")  # the submit of this fixture raises

    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert response.headers["content-type"] == "application/problem+json"
    assert "AssertionError" in response.json()["detail"]
    assert "Traceback" not in response.text


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    served = Served(tmp_path / "data", token="s3cret")
    served.publish("digits", 100)
    with TestClient(create_app(served.services), follow_redirects=False) as client:
        yield client
    served.close()


@pytest.mark.parametrize("path", ["/v1/runs", "/metrics", "/openapi.json", "/nothing", f"{VERSIONS}/latest"])
@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic s3cret", "s3cret", "Bearer", "Bearer s3crét"])
def test_everything_is_401_without_the_token(guarded: TestClient, path: str, given: str | None) -> None:
    response = guarded.get(path, headers={} if given is None else {b"Authorization": given.encode("latin-1")})

    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"
    assert "s3cret" not in response.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_everything_is_allowed_with_the_token(guarded: TestClient, scheme: str) -> None:
    assert guarded.get("/v1/runs", headers={"Authorization": f"{scheme} s3cret"}).status_code == 200


def test_health_checks_need_no_token(guarded: TestClient) -> None:
    assert guarded.get("/healthz").status_code == 200
    assert guarded.get("/readyz").status_code == 503


def test_responses_that_need_a_token_stay_out_of_shared_caches(guarded: TestClient) -> None:
    headers = {"Authorization": "Bearer s3cret"}
    response = guarded.get(f"{VERSIONS}/latest/files/version.json", headers=headers, follow_redirects=True)

    assert response.headers["cache-control"].startswith("private,")


def test_body_above_the_limit_is_refused(client: TestClient, served: Served) -> None:
    version = served.publish("digits", 100).versions[0]

    response = client.post(f"{VERSIONS}/{version.id}/metrics", json={"metrics": {"a": 1.0}, "error": "x" * (2 << 20)})

    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
