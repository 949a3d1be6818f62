"""Validations and leases over HTTP: answers, waiting, and the text without a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

import httpx2
import pytest
from starlette.testclient import TestClient

from ema_server.storage.catalog import Version
from support.served import WAIT_S, Served

PATH = "/v1/runs/digits/validations"
RESULT = {"metrics": {"accuracy": 0.5}, "samples": 10, "seconds": 0.25}


@pytest.fixture
def version(served: Served) -> Version:
    return served.publish("digits", 100, ["raw"]).versions[0]


def take(client: Any, url: str = "", **wanted: object) -> dict[str, Any]:
    found: dict[str, Any] = client.post(f"{url}/v1/leases", json={"worker": "w", **wanted}).json()
    return found


def test_answer_without_a_worker_says_how_to_start_one(client: TestClient, version: Version) -> None:
    refused = client.post(PATH, json={"average": "raw"})

    assert (refused.status_code, refused.json()["code"]) == (503, "no_evaluator")
    for words in ("--evaluate module:function", "ema evaluate module:function --run digits"):
        assert words in refused.json()["detail"]


def test_worker_for_another_task_does_not_count_and_its_task_is_named(
    client: TestClient, version: Version, served: Served
) -> None:
    served.publish("other", 5, ["raw"])
    take(client, task="robustness", run="other")
    refused = client.post(PATH, json={"average": "raw", "task": "robustness"})

    assert refused.status_code == 503
    assert "'robustness'" in refused.json()["detail"]
    assert "--task robustness" in refused.json()["detail"]


def test_result_with_a_missing_metric_ends_the_validation(client: TestClient, version: Version) -> None:
    lease = take(client)["lease"]
    place = urljoin(PATH, client.post(PATH, json={"average": "raw"}).headers["location"])
    settled = client.post(f"/v1/leases/{lease['id']}/result", json={**RESULT, "missing": {"loss": "nan"}})
    done = client.get(place).json()

    assert settled.json()["missing"] == {"loss": "nan"}
    assert (done["state"], done["metrics"], done["missing"]) == ("done", RESULT["metrics"], {"loss": "nan"})
    assert client.post(PATH, json={"average": "raw"}).status_code == 200
    assert take(client)["lease"] is None


def test_request_is_accepted_and_location_leads_to_its_result(client: TestClient, version: Version) -> None:
    take(client, averages=["raw"], run="digits", task="warm-up")
    lease = take(client)["lease"]
    accepted = client.post(PATH, json={"average": "raw", "rev": "step-100"})
    place = urljoin(PATH, accepted.headers["location"])
    running = client.get(place).json()
    settled = client.post(f"/v1/leases/{lease['id']}/result", json=RESULT)
    done = client.get(place).json()

    assert (accepted.status_code, place) == (202, f"{PATH}/{accepted.json()['id']}")
    assert (running["state"], running["worker"]) == ("running", "w")
    assert settled.status_code == 201
    assert (done["state"], done["version"], done["step"]) == ("done", version.id, 100)
    assert {key: done[key] for key in RESULT} == RESULT
    assert client.get("/v1/runs/digits/metrics").json()["metrics"] == [settled.json()]


def test_functions_error_is_the_result(client: TestClient, version: Version) -> None:
    lease = take(client)["lease"]
    asked = client.post(PATH, json={"average": "raw"}).json()
    client.post(f"/v1/leases/{lease['id']}/result", json={"error": "ValueError: no data"})
    found = client.get(f"{PATH}/{asked['id']}").json()

    assert (found["state"], found["error"], found["metrics"]) == ("failed", "ValueError: no data", {})


def test_version_with_metrics_is_200_and_needs_no_worker(client: TestClient, version: Version) -> None:
    client.post(f"/v1/runs/digits/averages/raw/versions/{version.id}/metrics", json=RESULT)
    known = client.post(PATH, json={"average": "raw"})
    again = client.post(PATH, json={"average": "raw", "again": True})

    assert (known.status_code, known.json()["state"], known.json()["samples"]) == (200, "done", 10)
    assert again.status_code == 503


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    return thread, found


def test_waiting_ends_with_the_result_and_does_not_block_others(url: str, version: Version) -> None:
    lease = take(httpx2, url)["lease"]
    place = urljoin(url + PATH, httpx2.post(url + PATH, json={"average": "raw"}).headers["location"])
    client = httpx2.Client(headers={"Prefer": "wait=60"}, timeout=90)  # one: each loads the system's certificates
    waits = [in_background(lambda: client.get(place)) for _ in range(50)]
    time.sleep(0.3)
    served_meanwhile = httpx2.get(f"{url}/healthz", timeout=WAIT_S).status_code
    still_waiting = all(thread.is_alive() for thread, _ in waits)
    httpx2.post(f"{url}/v1/leases/{lease['id']}/result", json=RESULT, timeout=WAIT_S)
    for thread, _ in waits:
        thread.join(WAIT_S)

    assert (served_meanwhile, still_waiting) == (200, True)
    client.close()
    answers = [found[0] for _, found in waits]
    assert {answer.json()["state"] for answer in answers} == {"done"}
    assert {answer.headers["preference-applied"] for answer in answers} == {"wait=60"}


def test_waiting_is_bounded_by_prefer_and_by_server_stop(
    url: str, client: TestClient, version: Version, served: Served
) -> None:
    take(client)
    asked = client.post(PATH, json={"average": "raw"}).json()
    unfinished = client.get(f"{PATH}/{asked['id']}", headers={"Prefer": "respond-async, wait=1"})
    served.stopping.set()
    stopping = client.get(f"{PATH}/{asked['id']}", headers={"Prefer": "wait=999999"})

    assert [answer.json()["state"] for answer in (unfinished, stopping)] == ["running", "running"]
    assert unfinished.headers["preference-applied"] == "wait=1"
    assert stopping.headers["preference-applied"] == "wait=60"


def test_validation_reports_a_lost_worker(client: TestClient, version: Version) -> None:
    lease = take(client)["lease"]
    asked = client.post(PATH, json={"average": "raw"}).json()
    gone = client.delete(f"/v1/leases/{lease['id']}")
    found = client.get(f"{PATH}/{asked['id']}").json()

    assert gone.status_code == 204
    assert found["state"] == "waiting"
    assert "ema evaluate" in found["note"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/runs/nope/validations", {"average": "raw"}, 404, "run_not_found"),
        (PATH, {"average": "nope"}, 404, "average_not_found"),
        (PATH, {"average": "raw", "rev": "step-7"}, 404, "version_not_found"),
        (PATH, {}, 422, "invalid"),
        (PATH, {"average": "raw", "surprise": 1}, 422, "invalid"),
        ("/v1/leases", {"worker": "w", "run": "nope"}, 404, "run_not_found"),
        ("/v1/leases", {"worker": ""}, 422, "invalid"),
        ("/v1/leases", {"worker": "w", "lease_s": 1e9}, 422, "invalid"),
        ("/v1/leases", {"worker": "w", "skip": ["latest"]}, 422, "invalid"),
        ("/v1/leases/nope/heartbeat", None, 410, "lease_lost"),
        ("/v1/leases/nope/result", RESULT, 410, "lease_lost"),
        ("/v1/leases/nope/result", {}, 422, "invalid"),
    ],
)
def test_invalid_request_is_a_problem(
    client: TestClient, version: Version, path: str, body: object, status: int, code: str
) -> None:
    refused = client.post(path, json=body)

    assert (refused.status_code, refused.json()["code"]) == (status, code)


def test_unknown_validation_is_not_found(client: TestClient, version: Version) -> None:
    refused = client.get(f"{PATH}/nope")

    assert (refused.status_code, refused.json()["code"]) == (404, "validation_not_found")


def test_heartbeat_extends_a_lease_and_nothing_due_gives_none(client: TestClient, version: Version) -> None:
    granted = client.post("/v1/leases", json={"worker": "w", "lease_s": 5})
    lease = granted.json()["lease"]
    beat = client.post(f"/v1/leases/{lease['id']}/heartbeat")
    nothing = client.post("/v1/leases", json={"worker": "v"})

    assert (granted.status_code, lease["version"]["id"]) == (201, version.id)
    assert (beat.status_code, beat.json()) == (200, {"expires_in_s": 5.0})
    assert (nothing.status_code, nothing.json()) == (200, {"lease": None, "held": 1})
