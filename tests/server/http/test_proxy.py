"""Behind a real nginx that adds a path prefix, every link that the server emits leads back through it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx2
import pytest

from ema_server.averager.jobs import AddAverage, Changed, Job
from support.reverse_proxy import nginx
from support.served import WAIT_S, Served

pytestmark = pytest.mark.process


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    def submit(job: Job) -> None:
        assert isinstance(job, AddAverage)
        over.show("digits", 100, ["ema-0.9", job.rule.name])
        job.reply(Changed(job.rule.name))

    over = Served(tmp_path / "data", submit=submit)
    yield over
    over.close()


@pytest.fixture
def prefix(url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of the server behind the proxy."""
    with nginx(url, tmp_path / "proxy") as address:
        yield address


def test_redirects_and_locations_keep_the_prefix(prefix: str, served: Served) -> None:
    version = served.publish("digits", 100).versions[0]
    versions = f"{prefix}/v1/runs/digits/averages/ema-0.9/versions"
    with httpx2.Client(timeout=WAIT_S, trust_env=False, follow_redirects=True) as client:
        for rest in ("", "/files/model.safetensors", "/files/version.json"):
            followed = client.get(f"{versions}/latest{rest}")
            assert (followed.status_code, str(followed.url)) == (200, f"{versions}/{version.id}{rest}")
        ledger = client.get(f"{versions}/latest/ledger?tail=3", follow_redirects=False)
        assert urljoin(str(ledger.url), ledger.headers["location"]) == f"{versions}/{version.id}/ledger?tail=3"
        client.post(f"{prefix}/v1/leases", json={"worker": "w"})
        created = [
            client.post(f"{prefix}/v1/runs/digits/averages", json={"spec": "ema:0.99"}),
            client.post(f"{prefix}/v1/runs/digits/validations", json={"average": "ema-0.9"}),
        ]
        for answer in created:
            assert answer.status_code in (201, 202), answer.text
            place = urljoin(str(answer.url), answer.headers["location"])
            assert place.startswith(f"{prefix}/v1/runs/digits/")
            assert client.get(place).status_code == 200, place


def test_problem_texts_name_no_path_without_the_prefix(prefix: str, served: Served) -> None:
    served.publish("digits", 100)
    served.show("digits", None, ["ema-0.9", "raw"])
    file = "v1/runs/digits/averages/ema-0.9/versions/latest/files/model.safetensors"
    with httpx2.Client(timeout=WAIT_S, trust_env=False) as client:
        problems = [
            client.get(f"{prefix}/v1/runs/digits/averages/raw/versions/latest"),
            client.get(f"{prefix}/{file}", headers={"Range": "bytes=5-"}),
            client.get(f"{prefix}/v1/runs/digits/validations/{'0' * 32}"),
            client.get(f"{prefix}/v1/nothing"),
        ]

    assert [answer.status_code for answer in problems] == [404, 409, 404, 404]
    for answer in problems:
        assert " /" not in answer.json()["detail"].replace("GET /v1/nothing", "")
