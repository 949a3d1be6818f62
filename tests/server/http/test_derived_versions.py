"""Derived versions over HTTP: listed, downloaded and evaluated like all others, and deleted on request."""

from __future__ import annotations

import pytest
from safetensors.torch import load, save
from starlette.testclient import TestClient

from ema_server.derived.store import Derivation
from ema_server.storage.catalog import Version
from support.served import Served, weights

_BASE = "/v1/runs/digits/averages/best/versions"


@pytest.fixture
def version(served: Served) -> Version:
    """A version `digits/best` beside the run's own, which is at step 100."""
    served.publish("digits", 100)
    what = Derivation("digits", "best", "ema:0.9", 90, 9, 0, "synthesized", {})
    return served.deriving.store.write(what, [save(weights("best", 90, 8))], None)


def test_derived_version_is_listed_with_its_kind(client: TestClient, version: Version) -> None:
    run = client.get("/v1/runs/digits").json()
    assert [item["name"] for item in run["averages"]] == ["ema-0.9"]
    assert run["derived"] == ["best"]
    assert client.get("/v1/runs").json()["runs"] == [run]

    found = client.get(_BASE).json()["versions"]
    assert [(item["id"], item["derived"]) for item in found] == [(version.id, "synthesized")]
    assert client.get("/v1/runs/digits/averages/ema-0.9/versions").json()["versions"][0]["derived"] is None
    problem = client.get("/v1/runs/digits/averages/worst/versions").json()
    assert problem["detail"].endswith("it has ema-0.9, best")


@pytest.mark.parametrize("rev", ["latest", "step-90"])
def test_aliases_of_a_derived_version_redirect_to_its_files(client: TestClient, version: Version, rev: str) -> None:
    moved = client.get(f"{_BASE}/{rev}/files/model.safetensors")
    assert (moved.status_code, moved.headers["Location"]) == (307, f"../../{version.id}/files/model.safetensors")

    path = f"{_BASE}/{version.id}/files/model.safetensors"
    whole = client.get(path)
    assert load(whole.content)["bias"].tolist() == [90.0] * 3
    part = client.get(path, headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, whole.content[8:16])
    assert client.get(path, headers={"If-None-Match": whole.headers["ETag"]}).status_code == 304


def test_worker_for_every_tenth_version_gets_a_derived_one(client: TestClient, version: Version) -> None:
    asked = {"worker": "w", "every": 10}
    given = [client.post("/v1/leases", json=asked).json()["lease"]["version"]["average"] for _ in range(2)]

    assert sorted(given) == ["best", "ema-0.9"]


def test_derived_version_is_deleted_by_its_id_alone(client: TestClient, served: Served, version: Version) -> None:
    refused = client.delete(f"{_BASE}/latest")
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid")
    assert version.id in refused.json()["detail"]
    assert client.delete(f"{_BASE}/{version.id}").status_code == 204

    assert not version.folder.exists()
    assert served.catalog.derived("digits") == ()
    assert client.delete(f"{_BASE}/{version.id}").status_code == 404
    assert client.get("/v1/runs/digits").json()["derived"] == []


def test_held_or_generation_versions_are_not_deleted(client: TestClient, served: Served, version: Version) -> None:
    with served.catalog.hold(version):
        held = client.delete(f"{_BASE}/{version.id}")
    assert (held.status_code, held.json()["code"]) == (409, "version_held")
    tracked = served.catalog.versions("digits", "ema-0.9")[0]
    refused = client.delete(f"/v1/runs/digits/averages/ema-0.9/versions/{tracked.id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_derived")
    assert tracked.folder.exists()
