"""The averages of a run over HTTP: status, addition, removal, and the ledger of a version."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ema_server.averager.jobs import AddAverage, Changed, Job, RemoveAverage, Unchanged, WhyNot
from ema_server.http.app import create_app
from ema_server.http.routes import ledgers
from support.served import Served

BASE = "/v1/runs/digits/averages"
Answer = Callable[[Job], Changed | Unchanged]


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Callable[[Answer], tuple[TestClient, Served]]]:
    """A client of an application whose averager gives the answers of a function, on the thread that asks."""
    served = Served(tmp_path / "data")
    clients: list[TestClient] = []

    def start(answer: Answer) -> tuple[TestClient, Served]:
        def submit(job: Job) -> None:
            assert isinstance(job, AddAverage | RemoveAverage)
            job.reply(answer(job))

        client = TestClient(create_app(replace(served.services, submit=submit)), follow_redirects=False)
        clients.append(client.__enter__())
        return client, served

    yield start
    for client in clients:
        client.__exit__()
    served.close()


def _write_ledger(served: Served, **content: object) -> str:
    """A version whose `version.json` has this content besides; its id."""
    version = served.publish("digits", 5).versions[0]
    path = version.folder / "version.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    return version.id


def test_each_average_has_a_status(client: TestClient, served: Served) -> None:
    served.publish("digits", 100, ["raw", "ema-0.9"])

    averages = client.get(BASE).json()["averages"]

    assert [average["name"] for average in averages] == ["raw", "ema-0.9"]
    assert averages[1] == client.get(f"{BASE}/ema-0.9").json()
    assert averages[1] == {
        "name": "ema-0.9",
        "spec": "ema:0.9",
        "updates": 100,
        "gap_steps": 0,
        "step": 100,
        "accumulator": "float32",
        "decay": 0.9,
        "half_life_steps": 6.6,
        "age_steps": 4.5,
        "initial_share": 0.25,
        "warning": None,
    }
    assert client.get(f"{BASE}/swa").json()["code"] == "average_not_found"
    assert client.get("/v1/runs/other/averages").json()["code"] == "run_not_found"


def test_added_average_is_answered_with_its_address(
    changing: Callable[[Answer], tuple[TestClient, Served]],
) -> None:
    asked: list[tuple[str, str]] = []

    def answer(job: Job) -> Changed:
        assert isinstance(job, AddAverage)
        asked.append((job.rule.spec, job.rule.name))
        served.show("digits", 100, ["raw", job.rule.name])
        return Changed(job.rule.name)

    client, served = changing(answer)
    served.show("digits", 100, ["raw"])

    response = client.post(BASE, json={"spec": "ema:0.9995"})
    named = client.post(BASE, json={"spec": "window:3,every=100", "name": "last"})

    assert (response.status_code, response.headers["Location"]) == (201, "averages/ema-0.9995")
    assert response.json() == client.get(f"{BASE}/last").json() | {"name": "ema-0.9995"}
    assert named.headers["Location"] == "averages/last"
    assert asked == [("ema:0.9995", "ema-0.9995"), ("window:3,every=100", "last")]


def test_removed_average_is_answered_with_nothing(changing: Callable[[Answer], tuple[TestClient, Served]]) -> None:
    client, served = changing(lambda job: Changed("raw"))
    served.show("digits", 100, ["raw", "ema-0.9"])

    response = client.delete(f"{BASE}/raw")

    assert (response.status_code, response.content) == (204, b"")
    assert client.delete(f"{BASE}/swa").json()["code"] == "average_not_found"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"spec": "ema:2"}, "decay"),
        ({"spec": "mean"}, "unknown average 'mean'"),
        ({"spec": "ema:0.9", "name": "a/b"}, "a/b"),
        ({"spec": ""}, "spec"),
        ({"spec": "raw", "color": 1}, "color"),
        ({}, "spec"),
    ],
)
def test_invalid_rule_is_a_422_that_names_it(
    client: TestClient, served: Served, body: dict[str, object], text: str
) -> None:
    served.show("digits", 100, ["raw"])

    response = client.post(BASE, json=body)

    assert (response.status_code, response.json()["code"]) == (422, "invalid")
    assert text in response.json()["detail"]


@pytest.mark.parametrize(
    ("why", "status", "code"),
    [
        (WhyNot.NOT_STREAMING, 409, "not_streaming"),
        (WhyNot.NO_SUCH_AVERAGE, 404, "average_not_found"),
        (WhyNot.CONFLICT, 409, "averages_conflict"),
        (WhyNot.OUT_OF_MEMORY, 507, "out_of_memory"),
        (WhyNot.NOT_DURABLE, 503, "publish_failed"),
    ],
)
def test_refused_change_is_a_problem_with_its_text(
    changing: Callable[[Answer], tuple[TestClient, Served]], why: WhyNot, status: int, code: str
) -> None:
    client, served = changing(lambda job: Unchanged(why, "because"))
    served.show("digits", 100, ["raw"])

    for response in (client.post(BASE, json={"spec": "swa"}), client.delete(f"{BASE}/raw")):
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.json()["detail"] == "because"


def test_stopping_server_changes_nothing(client: TestClient, served: Served) -> None:
    served.show("digits", 100, ["raw"])
    served.stopping.set()

    assert client.post(BASE, json={"spec": "swa"}).json()["code"] == "not_ready"


def test_ledger_lists_steps_and_shares_newest_first(client: TestClient, served: Served) -> None:
    ledger = {"origin": 0, "set": [1], "ranges": [[1, 3, 1], [5, 5, 1]]}
    version = _write_ledger(served, ledger=ledger, paces=[])

    whole = client.get(f"{BASE}/ema-0.9/versions/{version}/ledger").json()
    tail = client.get(f"{BASE}/ema-0.9/versions/{version}/ledger?tail=2").json()

    shares = {5: 1 - 0.9**2, 3: 0.9**2 * 0.1, 2: 0.9**3 * 0.1, 1: 0.9**4}
    assert [step for step, _ in whole["steps"]] == list(shares)
    assert dict(whole["steps"]) == pytest.approx(shares)
    assert (whole["version"], whole["spec"], whole["step"], whole["origin"]) == (version, "ema:0.9", 5, 0)
    assert whole["rest"] == pytest.approx(0, abs=1e-12)
    assert tail["steps"] == whole["steps"][:2]
    assert tail["rest"] == pytest.approx(shares[2] + shares[1])


def test_alias_redirects_to_the_ledger_of_the_version(client: TestClient, served: Served) -> None:
    version = _write_ledger(served, ledger={"origin": 0, "set": [5], "ranges": [[5, 5, 1]]}, paces=[])

    response = client.get(f"{BASE}/ema-0.9/versions/latest/ledger?tail=7")

    assert response.status_code == 307
    assert response.headers["Location"] == f"../{version}/ledger?tail=7"
    followed = client.get(f"{BASE}/ema-0.9/versions/latest/ledger", follow_redirects=True)
    assert followed.json()["steps"] == [[5, 1.0]]


def test_half_life_in_samples_uses_the_step_units_of_each_step(client: TestClient, served: Served) -> None:
    slow = {"from_step": 1, "samples_per_step": 10.0, "steps_per_epoch": None}
    fast = {"from_step": 3, "samples_per_step": 30.0, "steps_per_epoch": None}
    ledger = {"origin": 0, "set": [1], "ranges": [[1, 3, 1]]}
    version = served.publish("digits", 3).versions[0]
    served.catalog.remove(served.catalog.generations("digits")[0], force=True)
    path = version.folder / "version.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ledger": ledger, "paces": [slow, fast]}))
    changed = replace(version, spec="ema:half_life_samples=10")
    generation = served.publish("digits", 4)
    served.catalog.add(replace(generation, versions=(changed,)))

    steps = client.get(f"{BASE}/ema-0.9/versions/{version.id}/ledger").json()["steps"]

    assert dict(steps) == pytest.approx({3: 7 / 8, 2: 1 / 8 * 1 / 2, 1: 1 / 8 * 1 / 2})


def test_derived_version_has_no_ledger(client: TestClient, served: Served) -> None:
    version = _write_ledger(served, derived={"kind": "synthesized"})

    response = client.get(f"{BASE}/ema-0.9/versions/{version}/ledger")

    assert (response.status_code, response.json()["code"]) == (409, "no_ledger")


def test_ledger_pruned_during_the_request_is_a_404(client: TestClient, served: Served) -> None:
    response = client.get(f"{BASE}/ema-0.9/versions/{'0' * 40}/ledger")

    assert response.status_code == 404


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff", b'{"ledger": 3, "paces": []}', b'{"ledger": {}, "paces": [{"x": 1}]}', b"{}"]
)
def test_damaged_ledger_is_a_problem(client: TestClient, served: Served, damage: bytes) -> None:
    version = served.publish("digits", 3).versions[0]
    (version.folder / "version.json").write_bytes(damage)

    response = client.get(f"{BASE}/ema-0.9/versions/{version.id}/ledger")

    assert (response.status_code, response.json()["code"]) == (500, "damaged")
    assert f"version.json of version {version.id} has no valid ledger: " in response.json()["detail"]


def test_unreadable_ledger_is_a_problem(client: TestClient, served: Served) -> None:
    version = served.publish("digits", 3).versions[0]
    (version.folder / "version.json").unlink()

    response = client.get(f"{BASE}/ema-0.9/versions/{version.id}/ledger")

    assert (response.status_code, response.json()["code"]) == (500, "damaged")
    assert response.json()["detail"].endswith("could not be read: No such file or directory")


def test_long_ledger_does_not_block_the_event_loop(
    client: TestClient, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long read would block every other request, including the health check."""
    version = _write_ledger(served, ledger={"origin": 0, "set": [5], "ranges": [[5, 5, 1]]}, paces=[])
    on_loop: list[bool] = []

    def read(data: bytes) -> Any:
        on_loop.append(asyncio._get_running_loop() is not None)
        return json.loads(data)

    monkeypatch.setattr(ledgers, "read_json", read)
    assert client.get(f"{BASE}/ema-0.9/versions/{version}/ledger").json()["steps"] == [[5, 1.0]]
    assert on_loop == [False]


@pytest.mark.parametrize("tail", ["0", "-3", "x", "9" * 30])
def test_invalid_tail_is_a_422(client: TestClient, served: Served, tail: str) -> None:
    version = _write_ledger(served, ledger={"origin": 0, "set": [5], "ranges": [[5, 5, 1]]}, paces=[])

    response = client.get(f"{BASE}/ema-0.9/versions/{version}/ledger?tail={tail}")

    assert (response.status_code, response.json()["code"]) == (422, "invalid")
