"""Evaluation metrics over HTTP: reported for immutable versions, listed by run."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from ema_server.storage.catalog import Version
from support.served import Served

BASE = "/v1/runs/digits/averages/ema-0.9/versions"


@pytest.fixture
def version(served: Served) -> Version:
    return served.publish("digits", 100).versions[0]


def test_reported_metrics_are_listed_with_their_version(client: TestClient, version: Version) -> None:
    body = {"metrics": {"accuracy": 0.93, "loss": 1}, "worker": "w1", "samples": 360, "seconds": 1.5}

    response = client.post(f"{BASE}/{version.id}/metrics", json=body)

    rows = client.get("/v1/runs/digits/metrics").json()["metrics"]
    assert response.status_code == 201
    assert rows == [response.json()]
    assert rows[0].pop("at").endswith("Z")
    assert rows[0] == {
        "version": version.id,
        "average": "ema-0.9",
        "step": 100,
        "task": "default",
        "worker": "w1",
        "metrics": {"accuracy": 0.93, "loss": 1.0},
        "missing": {},
        "error": None,
        "samples": 360,
        "seconds": 1.5,
    }


def test_missing_metrics_are_stored_with_their_reasons_and_listed_as_valid_json(
    client: TestClient, version: Version
) -> None:
    body = {"metrics": {"accuracy": 0.93}, "missing": {"loss": "nan", "auc": "list '[]', not a number"}}
    only = client.post(f"{BASE}/{version.id}/metrics", json={"missing": {"loss": "inf"}, "worker": "other"})

    response = client.post(f"{BASE}/{version.id}/metrics", json=body)

    listed = client.get("/v1/runs/digits/metrics").text
    rows = json.loads(listed, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["metrics"]
    assert (response.status_code, only.status_code) == (201, 201)
    assert [(row["metrics"], row["missing"]) for row in rows] == [
        (body["metrics"], body["missing"]),
        ({}, {"loss": "inf"}),
    ]


def test_failure_is_stored_as_text_and_replaced_by_a_later_success(client: TestClient, version: Version) -> None:
    failed = client.post(f"{BASE}/{version.id}/metrics", json={"error": "ValueError: bad"})
    passed = client.post(f"{BASE}/{version.id}/metrics", json={"metrics": {"accuracy": 0.5}})

    rows = client.get("/v1/runs/digits/metrics").json()["metrics"]
    assert (failed.status_code, passed.status_code) == (201, 200)
    assert failed.json()["error"] == "ValueError: bad"
    assert [(row["metrics"], row["error"]) for row in rows] == [({"accuracy": 0.5}, None)]


def test_tasks_and_workers_have_separate_rows(client: TestClient, version: Version) -> None:
    for task, worker in (("a", None), ("b", None), ("a", "w")):
        client.post(f"{BASE}/{version.id}/metrics", json={"metrics": {"x": 1.0}, "task": task, "worker": worker})

    rows = client.get("/v1/runs/digits/metrics").json()["metrics"]
    assert [(row["task"], row["worker"]) for row in rows] == [("a", None), ("a", "w"), ("b", None)]


@pytest.mark.parametrize("rev", ["latest", "step-100"])
def test_metrics_for_an_alias_are_refused_and_name_the_version(client: TestClient, version: Version, rev: str) -> None:
    response = client.post(f"{BASE}/{rev}/metrics", json={"metrics": {"x": 1.0}})

    assert (response.status_code, response.json()["code"]) == (422, "alias_not_allowed")
    assert version.id in response.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"metrics": {"x": NaN}}',
        b'{"metrics": {"x": Infinity}}',
        b'{"metrics": {"x": 1e999}}',
        b'{"metrics": {"x": "1"}}',
        b'{"metrics": {"x": true}}',
        b'{"metrics": {"x": null}}',
        b'{"metrics": {"": 1}}',
        b'{"missing": {"x": ""}}',
        b'{"missing": {"x": null}}',
        b'{"missing": {"x": "nan"}, "error": "both"}',
        b'{"metrics": {"x": 1}, "missing": {"x": "nan"}}',
        b'{"metrics": {}}',
        b"{}",
        b'{"metrics": {"x": 1}, "error": "both"}',
        b'{"metrics": {"x": 1}, "samples": -1}',
        b'{"metrics": {"x": 1}, "unknown": 1}',
        b"[1]",
        b'{"metrics": ',
        b'{"metrics": {"\\ud800": 1}}',
        b'{"error": "\\ud800"}',
    ],
)
def test_invalid_report_is_a_422_problem(client: TestClient, version: Version, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}

    response = client.post(f"{BASE}/{version.id}/metrics", content=body, headers=headers)

    assert (response.status_code, response.json()["code"]) == (422, "invalid")
    assert response.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/runs/digits/metrics").json() == {"metrics": []}


@pytest.mark.parametrize("body", [b"\xff", b"[" * 100_000])
def test_unreadable_body_is_a_400_problem(client: TestClient, version: Version, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}

    response = client.post(f"{BASE}/{version.id}/metrics", content=body, headers=headers)

    assert (response.status_code, response.json()["code"]) == (400, "bad_request")


def test_report_on_an_unknown_version_is_refused(client: TestClient, version: Version) -> None:
    response = client.post(f"{BASE}/{'0' * 40}/metrics", json={"metrics": {"x": 1.0}})

    assert (response.status_code, response.json()["code"]) == (404, "version_not_found")


def test_report_on_a_version_pruned_during_evaluation_is_stored(
    client: TestClient, served: Served, version: Version
) -> None:
    client.get(f"{BASE}/{version.id}/files/model.safetensors")
    served.publish("digits", 200)
    served.catalog.remove(served.catalog.generations("digits")[1], force=True)
    assert client.get(f"{BASE}/{version.id}").status_code == 404

    response = client.post(f"{BASE}/{version.id}/metrics", json={"metrics": {"accuracy": 0.9}})

    assert (response.status_code, response.json()["step"]) == (201, 100)


def test_unreadable_database_is_a_503_problem(client: TestClient, served: Served, version: Version) -> None:
    served.metrics._run(lambda: served.metrics._connection.execute("DROP TABLE reports")).result(20)

    response = client.get("/v1/runs/digits/metrics")

    assert (response.status_code, response.json()["code"]) == (503, "metrics_unavailable")
