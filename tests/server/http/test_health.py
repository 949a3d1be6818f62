"""Health, readiness and Prometheus metrics."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from ema_proto.errors import RejectCode
from ema_server.compute.accelerator import Accelerator
from ema_server.evaluation.metric_store import Report, Subject
from ema_server.http.app import create_app
from ema_server.http.routes.prometheus import VALUES_MAX
from ema_server.storage.catalog import Version
from support.backends import InlineBackend
from support.served import WAIT_S, Served


def samples(text: str) -> dict[tuple[str, str], float]:
    """Every sample of an exposition, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name, labels] = sample.value
    return found


def test_health_says_that_the_event_loop_is_alive(client: TestClient) -> None:
    response = client.get("/healthz")

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_server_without_trainers_is_ready(client: TestClient, served: Served) -> None:
    served.beat()

    body = client.get("/readyz").json()

    assert body["ready"] is True
    assert sorted(body["checks"]) == ["averager", "data", "device", "disk", "ingest", "publishing"]
    assert body["checks"]["device"]["detail"] == "averages are kept on cpu: this machine's memory"


def test_readiness_fails_if_a_thread_has_not_started(client: TestClient, served: Served) -> None:
    served.telemetry.beat("averager")

    response = client.get("/readyz")

    body = response.json()
    assert (response.status_code, body["code"]) == (503, "not_ready")
    assert response.headers["content-type"] == "application/problem+json"
    assert {name: check["ok"] for name, check in body["checks"].items()} == {
        "ingest": False,
        "averager": True,
        "data": True,
        "device": True,
        "disk": True,
        "publishing": True,
    }


def test_readiness_fails_if_the_device_does_not_answer(served: Served) -> None:
    class Lost(InlineBackend):
        def describe(self) -> str:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    served.beat()
    with TestClient(create_app(replace(served.services, device=Accelerator("cuda:1", Lost())))) as client:
        response = client.get("/readyz")

    assert (response.status_code, response.json()["detail"]) == (
        503,
        "device: cuda:1: CUDA error: an illegal memory access was encountered: no run can be averaged; restart the "
        "server",
    )


def test_readiness_fails_without_the_data_folder(client: TestClient, served: Served) -> None:
    served.beat()
    shutil.rmtree(served.data)

    checks = client.get("/readyz").json()["checks"]

    assert not checks["data"]["ok"]
    assert not checks["disk"]["ok"]


def test_readiness_fails_if_the_disk_lacks_space_for_every_run(client: TestClient, served: Served) -> None:
    served.beat()
    served.publish("digits", 1)
    status = served.statuses.all()[0]
    served.statuses.set(
        type(status)(**{name: getattr(status, name) for name in status.__slots__} | {"memory_bytes": 1 << 60})
    )

    assert not client.get("/readyz").json()["checks"]["disk"]["ok"]


def test_readiness_names_a_run_that_cannot_be_published(client: TestClient, served: Served) -> None:
    served.beat()
    served.publish("digits", 1)
    status = served.statuses.all()[0]
    served.statuses.set(replace(status, publish_error="the generation could not be written: Disk quota exceeded"))

    publishing = client.get("/readyz").json()["checks"]["publishing"]

    assert not publishing["ok"]
    assert publishing["detail"] == "run digits: the generation could not be written: Disk quota exceeded"


def test_stopping_server_is_not_ready(client: TestClient, served: Served) -> None:
    served.beat()
    served.stopping.set()

    assert client.get("/readyz").status_code == 503


def test_metrics_show_the_counts_of_other_threads(client: TestClient, served: Served) -> None:
    served.publish("digits", 100, ["raw", "ema-0.9"])
    served.telemetry.ingest_bytes.inc(4096)
    served.telemetry.update_seconds.inc(2.5)
    served.telemetry.rejects.labels(RejectCode.RUN_IN_USE.value).inc()

    found = samples(client.get("/metrics").text)

    assert found["ema_ingest_bytes_total", ""] == 4096
    assert found["ema_update_seconds_total", ""] == 2.5
    assert found["ema_rejects_total", "code=run_in_use"] == 1
    assert {labels for name, labels in found if name == "ema_rejects_total"} == {
        f"code={code.value}" for code in RejectCode
    }
    assert found["ema_run_step", "run=digits"] == 100
    assert found["ema_run_state", "run=digits,state=active"] == 1
    assert found["ema_average_step", "average=ema-0.9,run=digits"] == 100


def test_metrics_count_responses_by_route_and_never_by_address(client: TestClient, served: Served) -> None:
    served.publish("digits", 100)
    client.get("/v1/runs/digits")
    client.get("/v1/runs/nope")
    client.get("/made/up/1")
    client.get("/made/up/2")

    found = samples(client.get("/metrics").text)

    assert found["ema_http_requests_total", "code=200,route=/v1/runs/{run}"] == 1
    assert found["ema_http_requests_total", "code=404,route=/v1/runs/{run}"] == 1
    assert found["ema_http_requests_total", "code=404,route=none"] == 2


def report(served: Served, version: Version, metrics: dict[str, float], **other: Any) -> None:
    subject = Subject(version.run, version.average, version.id, version.step)
    fields = {"task": "default", "worker": "w", "error": None, "samples": None, "seconds": None, "at": "2026", **other}
    served.metrics.add(Report(subject, metrics=metrics, **fields)).result(WAIT_S)


def test_metrics_show_the_newest_evaluation_of_every_average(client: TestClient, served: Served) -> None:
    first, second, third = (served.publish("digits", step, ["raw", "ema-0.9"]).versions for step in (100, 200, 300))
    report(served, first[0], {"top1": 0.5})
    report(served, second[0], {"top1": 0.6}, missing={"loss": "nan", "ppl": "-inf", "auc": "list '[]', not a number"})
    report(served, first[0], {"top1": 0.55}, at="2027", worker="late")
    report(served, third[0], {}, error="ValueError: no data")
    report(served, second[1], {"top1": 0.7})
    report(served, first[1], {"top1": 0.25}, task="robust")
    report(served, replace(first[0], run="deleted"), {"top1": 1.0})
    report(served, replace(first[0], average="removed", id="f" * 40), {"top1": 1.0})

    found = samples(client.get("/metrics").text)

    values = {labels: value for (name, labels), value in found.items() if name == "ema_version_metric"}
    steps = {labels: value for (name, labels), value in found.items() if name == "ema_version_metric_step"}
    nan = {labels for labels, value in values.items() if math.isnan(value)}
    assert nan == {"average=raw,metric=loss,run=digits", "average=raw,metric=auc,run=digits"}
    assert {labels: value for labels, value in values.items() if labels not in nan} == {
        "average=raw,metric=top1,run=digits": 0.6,
        "average=raw,metric=ppl,run=digits": -math.inf,
        "average=ema-0.9,metric=top1,run=digits": 0.7,
        "average=ema-0.9,metric=robust/top1,run=digits": 0.25,
    }
    assert steps.keys() == values.keys()
    assert steps["average=raw,metric=top1,run=digits"] == 200
    assert steps["average=ema-0.9,metric=robust/top1,run=digits"] == 100
    assert found["ema_evaluations_readable", ""] == 1
    assert found["ema_run_version_metrics_omitted", "run=digits"] == 0


def test_number_of_evaluation_metrics_of_a_run_is_bounded(client: TestClient, served: Served) -> None:
    for version in served.publish("digits", 100, ["raw", "ema-0.9"]).versions:
        report(served, version, {f"metric_{number}": 0.5 for number in range(VALUES_MAX - 100)})

    found = samples(client.get("/metrics").text)

    assert sum(name == "ema_version_metric" for name, _ in found) == VALUES_MAX
    assert found["ema_run_version_metrics_omitted", "run=digits"] == VALUES_MAX - 200


def test_metrics_are_served_while_evaluations_cannot_be_read(client: TestClient, served: Served) -> None:
    served.publish("digits", 100)
    served.metrics.submit(lambda db: db.execute("DROP TABLE reports")).result(WAIT_S)

    found = samples(client.get("/metrics").text)

    assert found["ema_evaluations_readable", ""] == 0
    assert found["ema_run_step", "run=digits"] == 100


def test_metrics_have_no_created_series(client: TestClient) -> None:
    response = client.get("/metrics")

    assert "_created" not in response.text
    assert response.headers["content-type"].startswith("text/plain")


def test_details_of_readiness_need_the_token(tmp_path: Path) -> None:
    served = Served(tmp_path / "data", token="s3cret")
    with TestClient(create_app(served.services)) as client:
        hidden = client.get("/readyz")
        shown = client.get("/readyz", headers={"Authorization": "Bearer s3cret"})
    served.close()

    assert hidden.status_code == shown.status_code == 503
    assert {name: check["ok"] for name, check in hidden.json()["checks"].items()} == {
        name: check["ok"] for name, check in shown.json()["checks"].items()
    }
    assert {check["detail"] for check in hidden.json()["checks"].values()} == {
        "details are for requests with the token"
    }
    assert "memory" in shown.text
    assert "memory" not in hidden.text
