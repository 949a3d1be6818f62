"""Versions with recomputed statistics: from `ema recalibrate` to a version that is listed, downloaded and evaluated."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from safetensors.torch import save

from ema_cli.demo.digits import DigitNet, load
from ema_reader import Reader
from ema_reader.evaluation.batchnorm import recomputed
from ema_server.derived.recalibration import BUFFERS_BYTES_MAX
from support.command import ema
from support.processes import ServerProcess
from trainer_client import EmaClient

WAIT_S = 60.0
EXAMPLES = Path(__file__).parents[2] / "examples"
LOADER = "evaluate_digits:training_batches"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a finished run `digits`, of a few steps."""
    with ServerProcess(tmp_path_factory.mktemp("served") / "data") as server:
        torch.manual_seed(0)
        model, images, labels = DigitNet(), load().train_images, load().train_labels
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with EmaClient(server.zmq, "digits", ["raw", "ema:0.9"], when_behind="wait") as client:
            client.attach(model, optimizer)
            for part in torch.arange(len(images)).split(90):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
                optimizer.step()
            assert client.finish(WAIT_S)
        yield server


def post(server: ServerProcess, data: bytes, *, average: str = "ema-0.9", rev: str = "") -> httpx2.Response:
    with Reader(server.http) as reader:
        found = rev or reader.version("digits", average).id
    path = f"/v1/runs/digits/averages/{average}/versions/{found}/recalibrate"
    return httpx2.post(server.http + path, content=data, timeout=WAIT_S)


def test_command_writes_a_version_with_recomputed_statistics(server: ServerProcess) -> None:
    done = ema("recalibrate", "digits/ema-0.9", "--bn", LOADER, "--url", server.http, cwd=EXAMPLES)
    with Reader(server.http) as reader:
        base, version = reader.version("digits", "ema-0.9"), reader.version("digits", "ema-0.9-bn")
        before, after = reader.load(base), reader.load(version)
    images = load().train_images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    expected = recomputed(before, "here", lambda: (DigitNet(), [images[part] for part in order.split(90)]))

    assert done.returncode == 0, done.stderr
    assert "recomputed 3 of 3 layers over 10 batches" in done.stderr
    assert done.stdout.strip() == version.id
    assert version.step == base.step
    assert {name for name in before if not torch.equal(before[name], after[name])} <= set(expected)
    assert any(not torch.equal(before[name], after[name]) for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-4, rtol=1e-4)  # threads add up in another order


def test_new_version_evaluates_as_the_old_one_with_recalibrate_bn(server: ServerProcess) -> None:
    assert post(server, save(_statistics(server))).status_code in (200, 201)
    arguments = ("evaluate", "evaluate_digits:accuracy", "--run", "digits", "--url", server.http, "--json")
    plain = ema(*arguments, "--averages", "ema-0.9-bn", cwd=EXAMPLES)
    recalibrated = ema(*arguments, "--averages", "ema-0.9", "--task", "x", "--recalibrate-bn", LOADER, cwd=EXAMPLES)

    (one,), (other,) = ([json.loads(line) for line in done.stdout.splitlines()] for done in (plain, recalibrated))
    assert one["metrics"]["accuracy"] == pytest.approx(other["metrics"]["accuracy"], abs=3 / 897)


def test_same_upload_gives_the_same_version(server: ServerProcess) -> None:
    data = save({"features.1.running_mean": torch.full((16,), 0.25)})
    first, second = post(server, data, average="raw"), post(server, data, average="raw")

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert first.json()["average"] == "raw-bn"
    assert httpx2.get(first.url.join(first.headers["location"]), timeout=WAIT_S).json() == first.json()


def test_irreplaceable_buffers_are_refused_with_a_reason(server: ServerProcess) -> None:
    weight = post(server, save({"head.bias": torch.zeros(10)}))
    nan = post(server, save({"features.1.running_mean": torch.full((16,), float("nan"))}))
    garbage = post(server, b"garbage")
    alias = post(server, save(_statistics(server)), rev="latest")
    made = post(server, save(_statistics(server))).json()["id"]
    twice = post(server, save(_statistics(server)), average="ema-0.9-bn", rev=made)

    answers = [weight, nan, garbage, alias, twice]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(422, "invalid")] * 5
    assert "'head.bias' is a param" in weight.json()["detail"]
    assert "'features.1.running_mean' holds NaN or Inf" in nan.json()["detail"]
    assert "recompute those of ema-0.9" in twice.json()["detail"]


def test_upload_above_the_limit_is_refused_before_it_is_read(server: ServerProcess) -> None:
    address = urlsplit(server.http)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=WAIT_S)
    connection.putrequest("POST", f"/v1/runs/digits/averages/raw/versions/{'0' * 40}/recalibrate")
    connection.putheader("Content-Length", str(BUFFERS_BYTES_MAX + 1))
    connection.endheaders(b"\0")
    answer = connection.getresponse()
    problem = json.loads(answer.read())
    connection.close()

    assert (answer.status, problem["code"]) == (413, "body_too_large")


def test_failing_loader_is_named_in_one_line_and_leaves_nothing(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "broken_data.py").write_text("def batches():\n    raise OSError('the archive is cut off')\n")
    with Reader(server.http) as reader:
        before = len(reader.versions("digits", "raw-bn")) if "raw-bn" in _derived(server) else 0
        done = ema("recalibrate", "digits/raw", "--bn", "broken_data:batches", "--url", server.http, cwd=tmp_path)
        after = len(reader.versions("digits", "raw-bn")) if "raw-bn" in _derived(server) else 0

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ema: broken_data:batches: OSError: the archive is cut off"
    assert before == after


def _derived(server: ServerProcess) -> list[str]:
    names: list[str] = server.get("/v1/runs/digits")["derived"]
    return names


def _statistics(server: ServerProcess) -> dict[str, torch.Tensor]:
    """What the loader of the example gives for `digits/ema-0.9`."""
    images = load().train_images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    with Reader(server.http) as reader:
        state = reader.load(reader.version("digits", "ema-0.9"))
    return recomputed(state, "here", lambda: (DigitNet(), [images[part] for part in order.split(90)]))
