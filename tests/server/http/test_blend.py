"""`POST …/blend`: a new version of the sum, its ledger, and problems that say what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load
from starlette.testclient import TestClient

from ema_server.averager.jobs import Applied
from ema_server.http import services
from support.afterwards import Afterwards, afterwards
from support.server_core import durable, joined, manifest_of

_STEPS = 6


def _weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.rand(50, generator=torch.Generator().manual_seed(step)), "n": torch.tensor(step)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Afterwards]:
    """The runs `r` and `s` of one model, six generations each; the tests ask for names of their own."""
    with afterwards(tmp_path_factory.mktemp("data")) as both:
        for run in ("r", "s"):
            joined(both.core.join(run, manifest_of(_weights(1)), ["raw", "ema:0.9", "window:k=2"]))
        for step in range(1, _STEPS + 1):
            for run in ("r", "s"):
                assert isinstance(both.core.apply(run, step, _weights(step)), Applied)
                durable(both.core.publish(run))
        yield both


@pytest.fixture
def client(both: Afterwards) -> Iterator[TestClient]:
    with both.client() as client:
        yield client


def _input(average: str, weight: Any, **others: Any) -> dict[str, Any]:
    return {"average": average, "weight": weight, **others}


def _ask(client: TestClient, *inputs: dict[str, Any], run: str = "r", **body: Any) -> Any:
    return client.post(f"/v1/runs/{run}/blend", json={"inputs": inputs, **body})


def _ledger(client: TestClient, version: dict[str, Any], query: str = "") -> Any:
    path = f"/v1/runs/{version['run']}/averages/{version['average']}/versions/{version['id']}"
    return client.get(f"{path}/ledger{query}")


def test_blend_is_answered_with_its_version_and_inputs(client: TestClient) -> None:
    answer = _ask(client, _input("ema-0.9", 0.75), _input("raw", 0.25))

    made = answer.json()
    version = made["version"]
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"averages/ema-0.9_0.75-raw_0.25/versions/{version['id']}"
    assert (version["step"], version["derived"], version["spec"]) == (_STEPS, "blended", "ema:0.9")
    assert [(part["average"], part["step"], part["weight"]) for part in made["inputs"]] == [
        ("ema-0.9", _STEPS, 0.75),
        ("raw", _STEPS, 0.25),
    ]
    file = client.get(f"/v1/runs/r/{answer.headers['Location']}/files/model.safetensors")
    assert load(file.content)["n"].item() == _STEPS
    again = _ask(client, _input("ema-0.9", 0.75), _input("raw", 0.25))
    assert (again.status_code, again.json()) == (200, made)


def test_other_versions_are_of_the_step_of_the_first_by_default(client: TestClient) -> None:
    inputs = (_input("ema-0.9", 0.5, rev="step-3"), _input("raw", 0.25), _input("raw", 0.25, run="s"))
    made = _ask(client, *inputs, name="steps").json()

    assert [(part["run"], part["step"]) for part in made["inputs"]] == [("r", 3), ("r", 3), ("s", _STEPS)]
    assert made["version"]["step"] == 3


def test_ledger_of_a_blend_is_the_weighted_sum_of_ledgers(client: TestClient) -> None:
    inputs = {"ema-0.9": 0.5, "window-2": 0.8, "raw": -0.3}
    made = _ask(client, *(_input(*each) for each in inputs.items()), name="sum").json()["version"]
    found = _ledger(client, made).json()

    expected: dict[int, float] = {}
    for average, weight in inputs.items():
        version = client.get(f"/v1/runs/r/averages/{average}/versions").json()["versions"][0]
        for step, share in _ledger(client, version).json()["steps"]:
            expected[step] = expected.get(step, 0.0) + weight * share
    steps = dict(found["steps"])
    assert list(steps) == sorted(expected, reverse=True)
    assert steps == pytest.approx(expected, abs=1e-15)
    assert math.fsum(steps.values()) + found["rest"] == pytest.approx(1.0, abs=1e-12)
    tail = _ledger(client, made, "?tail=1").json()
    assert tail["steps"] == found["steps"][:1]
    assert tail["rest"] == pytest.approx(1.0 - tail["steps"][0][1])


def test_blend_equals_the_replay_of_its_ledger(client: TestClient) -> None:
    made = _ask(client, _input("ema-0.9", 0.6), _input("window-2", 0.4), name="replayed").json()["version"]
    steps = _ledger(client, made).json()["steps"]
    exact = torch.stack([share * _weights(step)["w"].double() for step, share in steps]).sum(0)
    file = client.get(f"/v1/runs/r/averages/replayed/versions/{made['id']}/files/model.safetensors")

    assert (load(file.content)["w"].double() - exact).abs().max() < 1e-6


def test_blends_of_several_runs_or_derived_versions_have_no_ledger(client: TestClient) -> None:
    several = _ask(client, _input("raw", 0.5), _input("raw", 0.5, run="s"), name="several").json()["version"]
    answer = _ledger(client, several)

    assert (answer.status_code, answer.json()["code"]) == (409, "no_ledger")
    assert "blends several runs, whose steps are not comparable" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("inputs", "status", "code", "text"),
    [
        ([_input("raw", 0.5), _input("swa", 0.5)], 404, "average_not_found", "has no average 'swa'; it has raw"),
        ([_input("raw", 0.5), _input("raw", 0.5, run="t")], 404, "run_not_found", "run 't' does not exist"),
        ([_input("raw", 0.5), _input("ema-0.9", 0.5, rev="step-9")], 404, "version_not_found", "Held: step-6"),
        ([_input("raw", 0.5), _input("ema-0.9", 0.6)], 422, "invalid", "the weights 0.5, 0.6 add up to 1.1, not to 1"),
        ([_input("raw", 1e400), _input("ema-0.9", 0.6)], 422, "invalid", "finite"),
        ([_input("raw", "0.5"), _input("ema-0.9", 0.5)], 422, "invalid", "inputs.0.weight"),
        ([_input("raw", 1.0)], 422, "invalid", "inputs"),
        ([_input("raw", 1 / 65)] * 65, 422, "invalid", "inputs"),
        ([_input("raw", 0.5, run="s"), _input("raw", 0.5)], 422, "invalid", "the first version is of run 's'"),
        ([_input("raw", 1 / 32)] * 32, 422, "invalid", "give the blend a name"),
    ],
)
def test_impossible_blend_is_a_problem_with_the_reason(
    client: TestClient, inputs: list[dict[str, Any]], status: int, code: str, text: str
) -> None:
    body = '{"inputs": [' + ", ".join(_json(each) for each in inputs) + "]}"
    answer = client.post("/v1/runs/r/blend", content=body, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert text in answer.json()["detail"]


def _json(value: dict[str, Any]) -> str:
    """JSON in which an infinite number is 1e400."""
    pairs = (f'"{key}": ' + (f'"{item}"' if isinstance(item, str) else _number(item)) for key, item in value.items())
    return "{" + ", ".join(pairs) + "}"


def _number(value: float) -> str:
    return "1e400" if math.isinf(value) else repr(value)


@pytest.mark.parametrize("name", ["ema-0.9", "EMA-0.9", "raw"])
def test_blend_does_not_take_the_name_of_an_average(client: TestClient, name: str) -> None:
    answer = _ask(client, _input("raw", 0.5), _input("ema-0.9", 0.5), name=name)

    assert (answer.status_code, answer.json()["code"]) == (409, "name_taken")
    assert "keeps an average" in answer.json()["detail"]


def test_blend_leaves_the_space_that_generations_need(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "FREE_BYTES_MIN", 1 << 60)
    answer = _ask(client, _input("raw", 0.5), _input("ema-0.9", 0.5), name="large")

    assert (answer.status_code, answer.json()["code"]) == (507, "no_room")


def test_worker_leases_one_blend_by_its_id(client: TestClient) -> None:
    made = [
        _ask(client, _input("raw", gamma), _input("ema-0.9", 1 - gamma)).json()["version"] for gamma in (0.125, 0.25)
    ]
    asked = {"worker": "w", "run": "r", "averages": [made[0]["average"]], "version": made[0]["id"]}
    lease = client.post("/v1/leases", json=asked).json()["lease"]

    assert lease["version"]["id"] == made[0]["id"]
    refused = client.post("/v1/leases", json={**asked, "averages": []})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid")
    assert "version needs run and averages" in refused.json()["detail"]
    missing = client.post("/v1/leases", json={**asked, "version": "0" * 40})
    assert (missing.status_code, missing.json()["code"]) == (404, "version_not_found")
