"""`DELETE /v1/runs/{run}`, and what readers of a deleted run get."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from starlette.testclient import TestClient

from ema_reader import NotFound, Reader
from ema_server.http.app import create_app
from support.served import WAIT_S, Served
from support.server_core import ServerCore, durable, joined, manifest_of, running_core
from support.waiting import eventually

_WEIGHTS = {"w": torch.ones(100)}


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path / "data") as core:
        joined(core.join("r", manifest_of(_WEIGHTS), ["raw"]))
        core.apply("r", 1, _WEIGHTS)
        durable(core.publish("r"))
        yield core


@pytest.fixture
def http(core: ServerCore) -> Iterator[TestClient]:
    with TestClient(create_app(core.server.services), follow_redirects=False) as http:
        yield http


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "data")
    served.start()
    yield served
    served.close()


def test_a_streaming_run_is_refused_and_deleted_after_its_end(core: ServerCore, http: TestClient) -> None:
    refused = http.delete("/v1/runs/r")

    assert (refused.status_code, refused.json()["code"]) == (409, "run_streaming")
    assert "end its trainer first" in refused.json()["detail"]
    durable(core.finish("r"))
    version = core.catalog.versions("r", "raw")[0]
    assert (http.delete("/v1/runs/r").status_code, http.get("/v1/runs").json()) == (204, {"runs": []})
    base = "/v1/runs/r/averages/raw/versions"
    paths = ["", "/averages/raw", "/metrics", "/averages/raw/versions"]
    for path in [*(f"/v1/runs/r{path}" for path in paths), f"{base}/latest", f"{base}/{version.id}/files/version.json"]:
        gone = http.get(path)
        assert (gone.status_code, gone.json()["code"]) == (404, "run_not_found"), path
        assert "run 'r' was deleted at 20" in gone.json()["detail"]
    late = http.post(f"{base}/{version.id}/metrics", json={"metrics": {"loss": 1.0}})
    assert (late.status_code, late.json()["code"]) == (404, "run_not_found")


def test_an_unknown_run_and_one_deleted_before_are_not_found(core: ServerCore, http: TestClient) -> None:
    durable(core.finish("r"))
    http.delete("/v1/runs/r")

    for run, detail in (("r", "was deleted"), ("other", "does not exist")):
        answer = http.delete(f"/v1/runs/{run}")
        assert (answer.status_code, answer.json()["code"]) == (404, "run_not_found")
        assert detail in answer.json()["detail"]


def test_a_leased_version_is_deleted_with_its_run_and_the_lease_is_lost(core: ServerCore, http: TestClient) -> None:
    durable(core.finish("r"))
    asked = {"worker": "w", "task": "default", "run": "r"}
    lease = http.post("/v1/leases", json=asked).json()["lease"]

    assert http.delete("/v1/runs/r").status_code == 204

    beat = http.post(f"/v1/leases/{lease['id']}/heartbeat")
    assert (beat.status_code, beat.json()["code"]) == (410, "lease_lost")


def test_a_disk_that_refuses_leaves_the_run_as_it_is(
    core: ServerCore, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        raise PermissionError(13, "Permission denied")

    durable(core.finish("r"))
    monkeypatch.setattr(core.data_dir, "set_deleted", refuse)

    answer = http.delete("/v1/runs/r")

    assert (answer.status_code, answer.json()["code"]) == (503, "delete_failed")
    assert answer.json()["detail"] == "run 'r' cannot be deleted: Permission denied"
    assert http.get("/v1/runs/r/averages/raw/versions/latest").status_code == 307


def test_disk_space_of_a_run_is_in_its_status_and_in_the_metrics(core: ServerCore, http: TestClient) -> None:
    eventually(lambda: http.get("/v1/runs/r").json()["disk_bytes"], "it is measured", WAIT_S)

    nbytes = http.get("/v1/runs/r").json()["disk_bytes"]

    assert nbytes > 400
    assert f'ema_run_disk_bytes{{run="r"}} {float(nbytes)}' in http.get("/metrics").text


def test_a_running_download_of_a_deleted_run_ends_with_all_its_bytes(served: Served, tmp_path: Path) -> None:
    version = served.publish("digits", 100, ["raw"], size=1 << 21).versions[0]
    entry = next(file for file in version.files if file.name == "model.safetensors")
    path = f"/v1/runs/digits/averages/raw/versions/{version.id}/files/{entry.name}"
    with served.listening() as url, Reader(url, token="") as reader:
        wanted = reader.version("digits", "raw")
        with httpx2.Client(base_url=url, timeout=WAIT_S) as client, client.stream("GET", path) as response:
            pieces = response.iter_raw(1 << 16)
            first = next(pieces)
            reader.delete("digits")
            eventually(lambda: not version.folder.exists(), "its files are erased", WAIT_S)
            content = first + b"".join(pieces)
        with pytest.raises(NotFound, match="run 'digits' was deleted at"):
            reader.download(wanted, tmp_path / "out")

    assert len(content) == entry.size > 8 << 20, "more than the sockets buffer"
    assert hashlib.sha256(content).hexdigest() == entry.sha256
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", ["broken", "none"])
def test_run_without_a_readable_generation_is_deleted_by_its_name(tmp_path: Path, left: str) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest_of(_WEIGHTS), ["raw"]))
        if left == "broken":
            core.apply("r", 1, _WEIGHTS)
            folder = durable(core.finish("r")).versions[0].folder.parents[1]
    if left == "broken":
        (folder / "generation.json").write_text("{")
    with running_core(tmp_path) as core, TestClient(create_app(core.server.services)) as http:
        assert http.get("/v1/runs").json() == {"runs": []}
        found = http.get("/v1/runs/r")
        assert (found.status_code, found.json()["code"]) == (404, "run_unreadable")
        assert "no generation that can be read" in found.json()["detail"]
        assert http.delete("/v1/runs/r").status_code == 204
        eventually(lambda: list((tmp_path / "runs").iterdir()) == [], "its files are erased", WAIT_S)
        again = http.delete("/v1/runs/r")
        assert (again.status_code, again.json()["code"]) == (404, "run_not_found")


@pytest.mark.parametrize("name", ["..", ".", ".deleted-1-r", "%2e%2e"])
def test_no_folder_outside_the_runs_is_deleted(core: ServerCore, http: TestClient, name: str) -> None:
    answer = http.delete(f"/v1/runs/{name}")

    assert answer.status_code in (404, 405)
    assert core.data_dir.runs() == ("r",)
