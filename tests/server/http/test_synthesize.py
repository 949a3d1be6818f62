"""`POST …/synthesize`: a new version with how good it is, the same one again, and problems that say what to do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from starlette.testclient import TestClient

from ema_server.averager.jobs import Applied, Unchanged, WhyNot
from ema_server.http import services
from support.afterwards import Afterwards, afterwards
from support.server_core import WAIT_S, durable, joined, manifest_of

_STEPS = 10


def _weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.rand(50, generator=torch.Generator().manual_seed(step)), "n": torch.tensor(step)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Afterwards]:
    """A run of ten generations, and one that keeps no power average; the tests ask for names of their own."""
    with afterwards(tmp_path_factory.mktemp("data")) as both:
        manifest = manifest_of(_weights(1))
        joined(both.core.join("r", manifest, ["power:sigma_rel=0.05", "power:sigma_rel=0.1", "ema:0.9"]))
        joined(both.core.join("plain", manifest))
        for step in range(1, _STEPS + 1):
            for run in ("r", "plain"):
                assert isinstance(both.core.apply(run, step, _weights(step)), Applied)
            durable(both.core.publish("r"))
        durable(both.core.publish("plain"))
        yield both


@pytest.fixture
def client(both: Afterwards) -> Iterator[TestClient]:
    with both.client() as client:
        yield client


def _ask(client: TestClient, run: str = "r", **body: Any) -> Any:
    return client.post(f"/v1/runs/{run}/synthesize", json=body)


def test_synthesized_version_has_its_accuracy(client: TestClient) -> None:
    answer = _ask(client, sigma_rel=0.08)

    made = answer.json()
    assert answer.status_code == 201
    version = made.pop("version")
    assert answer.headers["Location"] == f"averages/power-0.08/versions/{version['id']}"
    assert (version["average"], version["spec"], version["step"]) == ("power-0.08", "power:sigma_rel=0.08", _STEPS)
    assert version["derived"] == "synthesized"
    assert made.pop("inputs")[0].keys() == {"average", "step", "id", "share"}
    assert 0 < made["estimated_error"] < 0.015
    assert 1 <= made["amplification"] < 3
    assert made["rounding"] == pytest.approx(made["amplification"] * 2**-24)
    assert (made["sigma_rel"], made["origin"], made["warning"]) == (0.08, 0, None)

    file = client.get(f"/v1/runs/r/{answer.headers['Location']}/files/model.safetensors")
    assert load(file.content)["n"].item() == _STEPS
    assert client.get("/v1/runs/r").json()["derived"].count("power-0.08") == 1


def test_same_request_again_gives_the_same_version(client: TestClient) -> None:
    first, again = (_ask(client, sigma_rel=0.07, step=8) for _ in range(2))

    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["Location"] == first.headers["Location"]


def test_width_may_be_given_as_an_exponent_and_a_name(client: TestClient) -> None:
    made = _ask(client, gamma=10, name="mine").json()

    assert (made["version"]["average"], made["version"]["spec"]) == ("mine", "power:gamma=10")
    assert made["gamma"] == 10
    assert made["sigma_rel"] == pytest.approx(0.0767, abs=1e-4)


def test_inaccurate_synthesis_has_a_warning(client: TestClient) -> None:
    made = _ask(client, sigma_rel=0.15).json()

    assert 0.015 < made["estimated_error"] < 0.1
    assert f"off by an estimated {made['estimated_error']:.1%}" in made["warning"]


def test_run_shows_its_ring(client: TestClient) -> None:
    ring = client.get("/v1/runs/r").json()["ring"]

    assert ring == {"snapshots": _STEPS, "first_step": 1, "last_step": _STEPS, "error": None}
    assert client.get("/v1/runs/plain").json()["ring"] is None
    metrics = client.get("/metrics").text
    assert f'ema_run_ring_snapshots{{run="r"}} {_STEPS}.0' in metrics
    assert 'ema_run_ring_snapshots{run="plain"} 0.0' in metrics
    assert 'ema_run_ring_failing{run="r"} 0.0' in metrics


@pytest.mark.parametrize(
    ("run", "body", "status", "code", "text"),
    [
        ("none", {"sigma_rel": 0.08}, 404, "run_not_found", "run 'none' does not exist"),
        ("plain", {"sigma_rel": 0.08}, 409, "cannot_synthesize", "begin the run with at least two"),
        ("r", {"sigma_rel": 0.25}, 409, "cannot_synthesize", "ask for a width closer to theirs"),
        ("r", {"sigma_rel": 0.08, "step": 99}, 409, "cannot_synthesize", "no snapshot of step 99: the nearest is of"),
        ("r", {"sigma_rel": 0.1}, 409, "name_taken", "keeps an average 'power-0.1' itself: download that"),
        ("r", {"sigma_rel": 0.08, "name": "ema-0.9"}, 409, "name_taken", "keeps an average 'ema-0.9' itself"),
        ("r", {"sigma_rel": 0.08, "name": "EMA-0.9"}, 409, "name_taken", "keeps an average 'ema-0.9' itself"),
        ("r", {}, 422, "invalid", "give either sigma_rel, for example 0.12, or gamma"),
        ("r", {"sigma_rel": 0.1, "gamma": 1}, 422, "invalid", "give either sigma_rel"),
        ("r", {"sigma_rel": 0.3}, 422, "invalid", "sigma_rel"),
        ("r", {"sigma_rel": "0.1"}, 422, "invalid", "sigma_rel"),
        ("r", {"gamma": -1.5}, 422, "invalid", "gamma"),
        ("r", {"sigma_rel": 0.08, "name": "../up"}, 422, "invalid", "'../up'"),
        ("r", {"sigma_rel": 0.08, "steps": 5}, 422, "invalid", "steps"),
    ],
)
def test_impossible_synthesis_is_a_problem_with_the_reason(
    client: TestClient, run: str, body: dict[str, Any], status: int, code: str, text: str
) -> None:
    answer = _ask(client, run, **body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert text in answer.json()["detail"]


def test_two_rules_do_not_share_a_name(client: TestClient) -> None:
    assert _ask(client, sigma_rel=0.08, name="shared").status_code == 201
    refused = _ask(client, sigma_rel=0.07, name="shared")

    assert (refused.status_code, refused.json()["code"]) == (409, "name_taken")
    assert "is already power:sigma_rel=0.08, not power:sigma_rel=0.07" in refused.json()["detail"]


def test_derived_name_must_not_equal_an_average_in_another_case(client: TestClient, both: Afterwards) -> None:
    assert _ask(client, sigma_rel=0.09, name="made").status_code == 201
    refused = both.core.add("r", "ema:0.5,name=Made")

    assert isinstance(refused, Unchanged)
    assert refused.why is WhyNot.CONFLICT
    assert "has derived versions named 'Made'" in refused.text


def test_averaging_publishing_and_reading_continue_during_synthesis(client: TestClient, both: Afterwards) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert go_on.wait(WAIT_S)

    with ThreadPoolExecutor(2) as pool:
        making = pool.submit(asyncio.run, both.deriving.run(slow))
        assert entered.wait(WAIT_S)
        waiting = pool.submit(_ask, client, "r", sigma_rel=0.081, step=9)
        assert isinstance(both.core.apply("plain", _STEPS + 1, _weights(1)), Applied)
        assert durable(both.core.publish("plain")).step == _STEPS + 1
        assert client.get("/v1/runs").status_code == 200
        assert not waiting.done()
        go_on.set()
        making.result(WAIT_S)
        assert waiting.result(WAIT_S).status_code == 201


def test_synthesis_leaves_the_space_that_generations_need(
    client: TestClient, both: Afterwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "FREE_BYTES_MIN", 1 << 60)
    answer = _ask(client, sigma_rel=0.06)

    assert (answer.status_code, answer.json()["code"]) == (507, "no_room")
    assert "must stay free for the runs: delete what is not needed" in answer.json()["detail"]


def test_disk_error_during_synthesis_is_a_problem_and_leaves_nothing(
    client: TestClient, both: Afterwards, tmp_path: Path
) -> None:
    folder = both.core.data_dir.derived_folder("r")
    away = folder.rename(tmp_path / "away") if folder.exists() else None
    folder.touch()
    try:
        answer = _ask(client, sigma_rel=0.055)
    finally:
        folder.unlink()
        if away is not None:
            away.rename(folder)

    assert (answer.status_code, answer.json()["code"]) == (503, "derive_failed")
    assert "it could not be written or read: " in answer.json()["detail"]
    assert both.core.catalog.versions("r", "power-0.055") == ()
