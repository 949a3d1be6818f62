"""The main job with real processes over real TCP: stream, average, survive, serve, evaluate."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import load_file
from torch import nn

from ema_reader import Reader
from support.command import ema
from support.processes import SUPPORT, Process, ServerProcess
from support.toy import Toy, check_version, ledger_steps
from support.waiting import eventually
from trainer_client import EmaClient


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "data") as process:
        yield process


def download(server: ServerProcess, run: str, average: str, to: Path) -> tuple[Path, dict[str, Any]]:
    """The newest version of an average, and its version.json."""
    with Reader(server.http) as reader:
        folder = reader.download(reader.version(run, average), to)
    return folder, json.loads((folder / "version.json").read_text())


def test_1000_steps_equal_a_float64_replay_of_the_ledger(server: ServerProcess, tmp_path: Path, lane: str) -> None:
    """The trainer is a process of its own; `wait` leaves no gap; chunks, if there are any, carry checksums."""
    script = str(SUPPORT / "toy_trainer.py")
    options = ["when_behind=wait", "averages=ema:0.9,ema:0.999,raw", *(["checksum=yes"] if lane == "zmq" else [])]
    with Process(script, server.zmq, "toy", "1000", str(tmp_path / "trainer.json"), "0", *options) as trainer:
        assert trainer.wait(90.0) == 0, list(trainer.errors)
        stats = json.loads(trainer.lines[-1])

    assert stats["committed"] == 1000
    for average in ("ema-0.9", "ema-0.999", "raw"):
        folder, about = download(server, "toy", average, tmp_path / average)
        check_version(folder)
        assert list(ledger_steps(about["ledger"])) == list(range(1, 1001))
        assert (about["updates"], about["gap_steps"]) == (1000, 0)


def test_ema_equals_timms_model_ema_v3(server: ServerProcess, tmp_path: Path) -> None:
    """V3 without warmup, written out: step 1 copies; floats move by lerp with weight 1 - decay; others are copied."""
    model, decay, shadow = Toy(), 0.98, dict[str, torch.Tensor]()
    with EmaClient(server.zmq, "timm", [f"ema:{decay}"], when_behind="wait") as client:
        for step in range(1, 301):
            client.update(model.at(step), step)
            for name, value in model.state_dict().items():
                if step == 1 or not value.is_floating_point():
                    shadow[name] = value.clone().float() if value.is_floating_point() else value.clone()
                elif name != "mask":
                    shadow[name].lerp_(value.float(), 1 - decay)

    folder, _ = download(server, "timm", f"ema-{decay}", tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == shadow.keys()
    for name, value in shadow.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_steps_skipped_by_every_are_no_gap_and_keep_the_decay_per_step(server: ServerProcess, tmp_path: Path) -> None:
    with EmaClient(server.zmq, "sparse", ["ema:0.9"], every=4, when_behind="wait") as client:
        for step in range(1, 101):
            client.update(Toy().at(step), step)

    folder, about = download(server, "sparse", "ema-0.9", tmp_path / "out")
    check_version(folder)
    assert list(ledger_steps(about["ledger"])) == list(range(4, 101, 4))
    assert about["gap_steps"] == 0


@pytest.mark.usefixtures("lane")
def test_two_concurrent_runs_are_independent(server: ServerProcess, tmp_path: Path) -> None:
    def train(run: str, shift: int) -> None:
        with EmaClient(server.zmq, run, ["ema:0.9", "raw"], when_behind="wait") as client:
            for step in range(1 + shift, 201 + shift):
                client.update(Toy().at(step), step)

    threads = [threading.Thread(target=train, args=item) for item in (("one", 0), ("two", 1000))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)

    for run, last in (("one", 200), ("two", 1200)):
        folder, about = download(server, run, "ema-0.9", tmp_path / run)
        check_version(folder)
        assert about["step"] == last


@pytest.mark.usefixtures("lane")
def test_thousand_tensors_stream_like_one(server: ServerProcess, tmp_path: Path) -> None:
    model = nn.ParameterDict({f"tensor_{index}": nn.Parameter(torch.zeros(3, 5)) for index in range(1000)})
    with EmaClient(server.zmq, "many", ["ema:0.5"], when_behind="wait") as client:
        for step in (1, 2):
            with torch.no_grad():
                for name, tensor in model.items():
                    tensor.fill_(step * 1000 + int(name.removeprefix("tensor_")))
            client.update(model, step)

    found = load_file(download(server, "many", "ema-0.5", tmp_path / "out")[0] / "model.safetensors")
    assert len(found) == 1000
    assert all(torch.equal(found[f"tensor_{i}"], torch.full((3, 5), 1500.0 + i)) for i in range(1000))


def test_rerun_sets_the_old_run_aside_on_request(server: ServerProcess) -> None:
    for resume, value in (("auto", 1.0), ("never", 2.0)):
        model = nn.Linear(4, 4)
        nn.init.constant_(model.weight, value)
        with EmaClient(server.zmq, "again", ["raw"], resume=resume, when_behind="wait") as client:  # type: ignore[arg-type]
            client.update(model, 1)

    with Reader(server.http) as reader:
        names = [run.run for run in reader.runs()]
        assert torch.equal(reader.load(reader.version("again", "raw"))["weight"], torch.full((4, 4), 2.0))
        (aside,) = [name for name in names if name != "again"]
        assert torch.equal(reader.load(reader.version(aside, "raw"))["weight"], torch.full((4, 4), 1.0))


def test_sigterm_publishes_applied_steps_and_a_restart_serves_them(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with ServerProcess(data) as first:
        client = EmaClient(first.zmq, "toy", ["ema:0.9"], when_behind="wait")
        for step in range(1, 31):
            client.update(Toy().at(step), step)
        assert client.flush()
        first.send(signal.SIGTERM)
        assert first.wait() == 0
    client.close(0.0)
    with ServerProcess(data) as second:
        status = second.get("/v1/runs/toy")
        folder, about = download(second, "toy", "ema-0.9", tmp_path / "out")

    assert (status["state"], status["published_step"]) == ("waiting", 30)
    check_version(folder)
    assert about["step"] == 30


def test_schedule_publishes_by_steps(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "data", "--publish-every-steps", "10") as server,
        EmaClient(server.zmq, "toy", ["raw"], when_behind="wait") as client,
    ):
        for step in range(1, 13):
            client.update(Toy().at(step), step)
        assert client.flush()
        eventually(lambda: server.get("/v1/runs/toy")["published_step"] is not None, "a generation by schedule")
        assert server.get("/v1/runs/toy")["published_step"] >= 10
        eventually(lambda: client.stats()["last_published_step"] is not None, "the trainer has the acknowledgement")


@pytest.mark.usefixtures("lane")
def test_snapshots_with_nan_change_nothing_and_are_logged_once(
    server: ServerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Toy()
    with EmaClient(server.zmq, "toy", ["ema:0.9", "raw"], when_behind="wait") as client:
        client.update(model.at(1), 1)
        for step in (2, 3, 4):
            with torch.no_grad():
                model.at(step).first.weight[3, 3] = torch.nan
            client.update(model, step)
        eventually(lambda: client.stats()["dropped"] == {"not_finite": 3}, "three refusals")
        assert server.get("/v1/runs/toy")["gap_steps"] == 3, "without a later step"
        client.update(model.at(5), 5)
        assert client.flush()
        assert client.stats()["dropped"] == {"not_finite": 3}
        status = server.get("/v1/runs/toy")

    assert [record.getMessage() for record in caplog.records if "applied" in record.getMessage()] == [
        "ema: step 2 was not applied: NaN or Inf at step 2 in 1 tensors: first.weight",
        "ema: step 5 is finite and applied; 3 snapshots before it were not",
    ]
    assert (status["quarantined"], status["gap_steps"]) == (3, 3)
    assert status["quarantine"]["step"] == 4
    assert "first.weight" in str(status["quarantine"]["tensors"])
    assert status["exempt"] == ["mask"]
    folder, about = download(server, "toy", "ema-0.9", tmp_path / "out")
    check_version(folder)
    assert (about["updates"], about["gap_steps"]) == (2, 3)


@pytest.mark.usefixtures("lane")
def test_batch_norm_statistics_with_nan_stop_no_average(
    server: ServerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    weights: list[torch.Tensor] = []
    with EmaClient(server.zmq, "bn", ["ema:0.5", "raw"], when_behind="wait") as client:
        client.attach(model, optimizer)
        for step in range(1, 7):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            if step == 3:
                model.get_buffer("1.running_var").fill_(torch.nan)
            optimizer.step()
            weights.append(model.get_parameter("0.weight").detach().clone())
        assert client.flush()
        status = server.get("/v1/runs/bn")
        shown = ema("status", "bn", "--url", server.http)

    expected = weights[0].double()
    for weight in weights[1:]:
        expected = 0.5 * expected + 0.5 * weight.double()
    assert "NaN or Inf in buffers, which averages keep at their last finite value: 1.running_var" in shown.stdout
    folder, about = download(server, "bn", "ema-0.5", tmp_path / "ema")
    found = load_file(folder / "model.safetensors")
    torch.testing.assert_close(found["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert found["1.running_var"].isfinite().all()
    assert (about["updates"], about["gap_steps"]) == (6, 0)
    raw, _ = download(server, "bn", "raw", tmp_path / "raw")
    assert load_file(raw / "model.safetensors")["1.running_var"].isnan().all(), "as it was sent"
    assert status["nonfinite_buffers"] == {
        "tensors": ["1.running_var"],
        "first_step": 3,
        "last_step": 6,
        "snapshots": 4,
    }
    assert not [record for record in caplog.records if "not applied" in record.getMessage()]


def test_garbage_at_the_socket_disturbs_no_run(server: ServerProcess, tmp_path: Path) -> None:
    rng = random.Random(7)
    with EmaClient(server.zmq, "toy", ["ema:0.9"], when_behind="wait") as client, zmq.Context() as context:
        for step in range(1, 61):
            with context.socket(zmq.DEALER) as stranger:
                stranger.setsockopt(zmq.LINGER, 200)
                stranger.connect(server.zmq)
                parts = [rng.randbytes(rng.choice([0, 1, 63, 64, 65, 5000])) for _ in range(rng.randint(1, 4))]
                stranger.send_multipart([b"EMAS\x01\x00" + parts[0], *parts[1:]] if step % 2 else parts)
            client.update(Toy().at(step), step)

    folder, about = download(server, "toy", "ema-0.9", tmp_path / "out")
    check_version(folder)
    assert about["updates"] == 60


def test_evaluation_worker_reports_every_average_and_ends_with_the_run(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "def step_of(state):\n    return {'step': float(state['norm.num_batches_tracked'])}\n"
    )
    command = [
        "-c",
        "import os, sys; os.chdir(sys.argv.pop()); from ema_cli.main import main; main()",
        *("evaluate", "judge:step_of", "--run", "toy", "--averages", "all", "--url", server.http, str(tmp_path)),
    ]
    with Process(*command) as worker:
        with EmaClient(server.zmq, "toy", ["ema:0.9", "raw"], when_behind="wait") as client:
            for step in range(1, 41):
                client.update(Toy().at(step), step)
        assert worker.wait(60.0) == 0, list(worker.errors)

    rows = server.get("/v1/runs/toy/metrics")["metrics"]
    last = {row["average"]: row["metrics"] for row in rows if row["step"] == 40}
    assert last == {"ema-0.9": {"step": 40.0}, "raw": {"step": 40.0}}


def test_curl_downloads_an_alias_through_its_redirect(server: ServerProcess, tmp_path: Path) -> None:
    model = Toy().at(1)
    with EmaClient(server.zmq, "toy", ["raw"], when_behind="wait") as client:
        client.update(model, 1)
    url = f"{server.http}/v1/runs/toy/averages/raw/versions/latest/files/model.safetensors"
    target = tmp_path / "model.safetensors"
    subprocess.run(["curl", "-sSfL", "--max-time", "30", "-o", str(target), url], check=True)
    resumed = subprocess.run(["curl", "-sSfL", "--max-time", "30", "-C", "-", "-o", str(target), url], check=False)

    model.load_state_dict(load_file(target), strict=True)
    assert resumed.returncode != 0, "an alias cannot be resumed: it may have moved"
