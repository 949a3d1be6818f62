"""Runs, versions and publishing over HTTP: what the statuses and the catalog say, as JSON."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ema_server.averager.jobs import Durable, Failed, Job, Publish
from ema_server.http.app import create_app
from ema_server.runs.ranks import LastDropped
from ema_server.runs.status_store import RunState
from support.served import Served

BASE = "/v1/runs/digits/averages/ema-0.9/versions"
Answer = Callable[[Publish], Durable | Failed]


def test_runs_are_listed_by_name_with_their_state(client: TestClient, served: Served) -> None:
    served.publish("b", 2)
    served.show("a", None, ["raw"], RunState.WAITING)

    runs = client.get("/v1/runs").json()["runs"]

    assert [(run["run"], run["state"], run["step"]) for run in runs] == [("a", "waiting", None), ("b", "active", 2)]


def test_run_has_steps_rates_gaps_and_averages(client: TestClient, served: Served) -> None:
    served.publish("digits", 100, ["raw", "ema-0.9"])

    run = client.get("/v1/runs/digits").json()

    assert run["steps_per_second"] == 2.5
    assert run["quarantine"] is None
    assert run["gap_steps"] == 0
    assert [average["name"] for average in run["averages"]] == ["raw", "ema-0.9"]
    assert run["averages"] == client.get("/v1/runs/digits/averages").json()["averages"]


def test_run_of_a_sharded_trainer_shows_its_ranks_and_dropped_steps(client: TestClient, served: Served) -> None:
    served.publish("digits", 100)
    assert client.get("/v1/runs/digits").json()["ranks"] is None
    served.services.ranks.joined("digits", 4, is_new=True)
    last = LastDropped(7, 2, "lost", "rank 2 is lost", "2026-01-01T00:00:00Z")
    served.services.ranks.dropped("digits", last)
    served.services.ranks.set_missing("digits", (2,))

    assert client.get("/v1/runs/digits").json()["ranks"] == {
        "world": 4,
        "present": 3,
        "missing": [2],
        "dropped_steps": 1,
        "dropped": [{"rank": 2, "reason": "lost", "steps": 1}],
        "last_dropped": asdict(last),
    }
    metrics = client.get("/metrics").text
    assert 'ema_run_world{run="digits"} 4.0' in metrics
    assert 'ema_run_ranks_present{run="digits"} 3.0' in metrics
    assert 'ema_run_dropped_steps_total{rank="2",reason="lost",run="digits"} 1.0' in metrics


def test_versions_are_listed_newest_first_with_their_files(client: TestClient, served: Served) -> None:
    old, new = served.publish("digits", 100).versions[0], served.publish("digits", 200).versions[0]

    versions = client.get(BASE).json()["versions"]

    assert [version["id"] for version in versions] == [new.id, old.id]
    assert sorted(versions[0]) == [
        "average",
        "created",
        "decay",
        "derived",
        "files",
        "gap_steps",
        "half_life_steps",
        "id",
        "run",
        "spec",
        "step",
        "updates",
    ]
    assert versions[0]["files"] == [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in new.files]


def test_step_names_the_newer_of_two_versions_after_a_rewind(client: TestClient, served: Served) -> None:
    served.publish("digits", 100)
    again = served.publish("digits", 100).versions[0]

    assert client.get(f"{BASE}/step-100").headers["location"] == again.id
    assert client.get(f"{BASE}/step-100", follow_redirects=True).json()["id"] == again.id


def test_version_is_immutable_json_with_a_validator(client: TestClient, served: Served) -> None:
    version = served.publish("digits", 100).versions[0]

    first = client.get(f"{BASE}/{version.id}")
    again = client.get(f"{BASE}/{version.id}", headers={"If-None-Match": first.headers["etag"]})

    assert first.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert (again.status_code, again.content) == (304, b"")


@pytest.fixture
def publishing(tmp_path: Path) -> Iterator[Callable[[Answer], tuple[TestClient, Served]]]:
    """A client of a server whose averager is a thread that answers what the test says."""
    opened: list[tuple[TestClient, Served]] = []

    def make(answer: Answer) -> tuple[TestClient, Served]:
        def submit(job: Job) -> None:
            assert isinstance(job, Publish)
            averager.submit(lambda: job.reply(answer(job)))

        served = Served(tmp_path / "data", submit=submit)
        client = TestClient(create_app(served.services), follow_redirects=False)
        client.__enter__()
        opened.append((client, served))
        return client, served

    with ThreadPoolExecutor(1) as averager:
        yield make
    for client, served in opened:
        client.__exit__(None, None, None)
        served.close()


def test_publish_answers_201_with_the_new_versions(
    publishing: Callable[[Answer], tuple[TestClient, Served]],
) -> None:
    def answer(job: Publish) -> Durable:
        return Durable(200, served.publish(job.run, 200, ["raw", "ema-0.9"]).versions, new=True)

    client, served = publishing(answer)
    served.show("digits", 200, ["raw", "ema-0.9"])

    response = client.post("/v1/runs/digits/versions")

    assert response.status_code == 201
    assert response.json()["step"] == 200
    assert [version["average"] for version in response.json()["versions"]] == ["raw", "ema-0.9"]


def test_publish_without_changes_answers_200_with_existing_versions(
    publishing: Callable[[Answer], tuple[TestClient, Served]],
) -> None:
    client, served = publishing(lambda job: Durable(100, generation.versions, new=False))
    generation = served.publish("digits", 100)

    response = client.post("/v1/runs/digits/versions")

    assert response.status_code == 200
    assert [version["id"] for version in response.json()["versions"]] == [generation.versions[0].id]


def test_failed_publish_is_a_503_with_the_reason(
    publishing: Callable[[Answer], tuple[TestClient, Served]],
) -> None:
    client, served = publishing(lambda job: Failed("No space left on device"))
    served.publish("digits", 100)

    response = client.post("/v1/runs/digits/versions")

    assert (response.status_code, response.json()["code"]) == (503, "publish_failed")
    assert "No space left on device" in response.json()["detail"]


def test_stopping_server_refuses_to_publish_without_delay(client: TestClient, served: Served) -> None:
    served.publish("digits", 100)
    served.stopping.set()

    response = client.post("/v1/runs/digits/versions")

    assert (response.status_code, response.json()["code"]) == (503, "not_ready")


def test_event_loop_serves_others_while_a_run_is_published(
    publishing: Callable[[Answer], tuple[TestClient, Served]],
) -> None:
    release = threading.Event()

    def answer(job: Publish) -> Durable:
        release.wait(20)
        return Durable(100, (), new=False)

    client, served = publishing(answer)
    served.publish("digits", 100)
    with ThreadPoolExecutor(1) as other:
        publish = other.submit(client.post, "/v1/runs/digits/versions")
        time.sleep(0.05)
        alive = client.get("/healthz").status_code
        was_waiting = not publish.done()
        release.set()

        assert (alive, was_waiting, publish.result(20).status_code) == (200, True, 200)
