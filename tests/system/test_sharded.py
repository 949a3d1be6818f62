"""Sharded trainers: real FSDP2, HSDP and tensor parallelism on gloo. Files are byte for byte those of a whole model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.command import ema
from support.forwarder import Forwarder
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.processes import Process, ServerProcess
from support.waiting import eventually

SCRIPT = str(Path(__file__).parents[1] / "support" / "sharded_training.py")

pytestmark = pytest.mark.slow


def _train(server: ServerProcess, **given: Any) -> list[dict[str, Any]]:
    """Run a training; returns what each rank printed, by rank."""
    arguments: dict[str, Any] = {"endpoint": server.zmq, "run": "sharded", "kind": "fsdp", "world": 2, "steps": 4}
    arguments |= given
    with Process(SCRIPT, json.dumps(arguments)) as process:
        code = process.wait(100.0)
        ranks = sorted((json.loads(line) for line in process.lines), key=lambda each: int(each["rank"]))
        if "kill" not in given:
            assert code == 0, "\n".join(list(process.errors)[-30:])
            assert all(each["done"] for each in ranks), ranks
    return ranks


def _files(data: Path, run: str) -> dict[str, bytes]:
    """The weights of the newest generation of a run, by average."""
    generation = max((data / "runs" / run / "generations").iterdir())
    return {path.name: (path / "model.safetensors").read_bytes() for path in (generation / "averages").iterdir()}


def _ledger(data: Path, run: str) -> list[Any]:
    generation = max((data / "runs" / run / "generations").iterdir())
    records = [json.loads((path / "version.json").read_text()) for path in sorted((generation / "averages").iterdir())]
    return [{key: value for key, value in record.items() if "ledger" in key or key == "step"} for record in records]


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("fsdp", 1),
        ("fsdp", 2),
        ("fsdp", 4),
        ("bf16", 2),
        ("offload", 2),
        ("columns", 2),
        ("hsdp", 4),
        ("tensor-parallel", 4),
        ("uneven", 8),
        ("checkpointing", 2),
        ("compiled-blocks", 2),
        ("compiled", 2),
        ("pipeline", 2),
    ],
)
def test_averages_of_shards_are_those_of_the_whole_model(kind: str, world: int, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        ranks = _train(server, kind=kind, world=world, weights=str(tmp_path / "weights.pt"))
        assert [each["committed"] for each in ranks] == [4] * world
        files = _files(tmp_path / "data", "sharded")
        assert set(files) == {"raw", "ema-0.9"}
        assert files == _files(tmp_path / "data", "sharded-twin")
        assert _ledger(tmp_path / "data", "sharded") == _ledger(tmp_path / "data", "sharded-twin")
    last = torch.load(tmp_path / "weights.pt")[4]
    (tmp_path / "raw.safetensors").write_bytes(files["raw"])
    raw = load_file(tmp_path / "raw.safetensors")
    assert set(raw) == set(last)
    assert all(torch.equal(value, last[name]) for name, value in raw.items())


def test_run_continues_with_another_number_of_ranks(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        first = 1
        for world in (4, 2, 1, 4):
            is_last = first == 10
            _train(server, world=world, steps=3, first_step=first, finish=is_last, seed=first)
            first += 3
        assert _files(tmp_path / "data", "sharded") == _files(tmp_path / "data", "sharded-twin")
        assert [each["step"] for each in _ledger(tmp_path / "data", "sharded")] == [12, 12]
        assert _ledger(tmp_path / "data", "sharded") == _ledger(tmp_path / "data", "sharded-twin")


def test_killed_rank_costs_its_step_and_a_restarted_job_goes_on(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        client = {"incarnation": 0}
        _train(server, world=2, steps=6, kill=[1, 4], client=client, twin=False, finish=False)
        client = {"incarnation": 1}
        ranks = _train(server, world=2, steps=3, first_step=5, client=client, twin=False)
        assert [each["committed"] for each in ranks] == [3, 3]
        assert [each["step"] for each in _ledger(tmp_path / "data", "sharded")] == [7, 7]
        shown = server.get("/v1/runs/sharded")["ranks"]
        assert (shown["world"], shown["present"]) == (2, 0)


def test_rank_without_a_connection_at_the_end_learns_that_the_run_is_finished(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server, Forwarder(int(server.zmq.rpartition(":")[2])) as link:
        given = {"endpoint": server.zmq, "run": "sharded", "kind": "fsdp", "world": 2, "steps": 2, "twin": False}
        given |= {"endpoint_of": {"1": f"tcp://127.0.0.1:{link.port}"}, "folder": str(tmp_path), "wait_at": ["end"]}
        with Process(SCRIPT, json.dumps(given)) as process:
            eventually(lambda: len(list(tmp_path.glob("reached-*"))) == 2, "both ranks have trained", timeout_s=60.0)
            link.cut()
            (tmp_path / "go-end-0").touch()
            assert json.loads(process.wait_line(lambda line: '"rank": 0' in line))["done"] is True
            link.restore()
            (tmp_path / "go-end-1").touch()
            assert json.loads(process.wait_line(lambda line: '"rank": 1' in line))["done"] is True, process.errors
            assert process.wait() == 0
        run = server.get("/v1/runs/sharded")
        assert (run["state"], run["step"]) == ("finished", 2)


@pytest.mark.parametrize(
    ("given", "committed"),
    [
        ({"accumulate": True}, 4),
        ({"evaluate": True}, 4),
        ({"checkpoint": 2, "rewind": [3, 2]}, 5),
    ],
)
def test_what_training_does_between_steps_changes_nothing(
    given: dict[str, Any], committed: int, tmp_path: Path
) -> None:
    with ServerProcess(tmp_path / "data") as server:
        ranks = _train(server, **given)
        assert [each["committed"] for each in ranks] == [committed] * 2
        assert [each["answers"] for each in ranks] == [[True] if "checkpoint" in given else []] * 2
        assert _files(tmp_path / "data", "sharded") == _files(tmp_path / "data", "sharded-twin")
        assert _ledger(tmp_path / "data", "sharded") == _ledger(tmp_path / "data", "sharded-twin")


def test_rank_that_holds_nothing_counts_steps_and_finishes(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        ranks = _train(server, kind="narrow", world=4, checkpoint=2, rewind=[3, 2])
        assert [each["committed"] for each in ranks] == [5] * 3 + [0]
        assert [each["answers"] for each in ranks] == [[True]] * 4
        assert [each["steps"] for each in ranks] == [4] * 4
        assert _files(tmp_path / "data", "sharded") == _files(tmp_path / "data", "sharded-twin")
        assert _ledger(tmp_path / "data", "sharded") == _ledger(tmp_path / "data", "sharded-twin")


def test_step_that_one_rank_skips_because_the_server_is_slow_is_one_gap_and_reported_at_once(tmp_path: Path) -> None:
    """The server is stopped; rank 0 waits for a slot at step 4, and rank 1 skips that step."""
    with ServerProcess(tmp_path / "data") as server:
        given = {"endpoint": server.zmq, "run": "sharded", "kind": "fsdp", "world": 2, "steps": 5, "twin": False}
        given |= {"folder": str(tmp_path), "wait_at": [1, 4], "weights": str(tmp_path / "weights.pt")}
        given |= {"client_of": {"1": {"when_behind": "skip"}}}
        with Process(SCRIPT, json.dumps(given)) as process:

            def shown() -> Any:
                return server.get("/v1/runs/sharded")

            def let_go(step: int) -> None:
                for rank in range(2):
                    (tmp_path / f"go-{step}-{rank}").touch()

            eventually(lambda: len(list(tmp_path.glob("reached-1-*"))) == 2, "both ranks are at step 1", timeout_s=60.0)
            server.send(signal.SIGSTOP)
            let_go(1)
            eventually((tmp_path / "reached-4-1").exists, "rank 1 has skipped step 4")
            assert not (tmp_path / "reached-4-0").exists()
            server.send(signal.SIGCONT)
            # Both ranks stay at step 4: nothing but SKIP can have told the server.
            ranks = eventually(lambda: shown()["ranks"]["dropped_steps"] and shown()["ranks"], "step 4 is dropped")
            assert ranks["dropped"] == [{"rank": 1, "reason": "skipped", "steps": 1}]
            assert ranks["last_dropped"]["text"] == "rank 1 skipped it: busy, see its log"
            let_go(4)
            assert process.wait(60.0) == 0, "\n".join(process.errors)
            lines = sorted((json.loads(line) for line in process.lines), key=lambda each: int(each["rank"]))
        assert [(each["done"], each["committed"]) for each in lines] == [(True, 4)] * 2
        assert [each["dropped"] for each in lines] == [{"dropped": 1}, {}]
        assert [(each["skipped"]["busy"], sum(each["skipped"].values())) for each in lines] == [(0, 0), (1, 1)]
        assert (shown()["step"], shown()["gap_steps"]) == (5, 1)
        assert "rank 1 skipped: 1\n  the last one is step 4: rank 1 skipped it: busy" in _status(server)
        metrics = httpx2.get(f"{server.http}/metrics").text
        assert 'ema_run_dropped_steps_total{rank="1",reason="skipped",run="sharded"} 1.0' in metrics
    _check_replay(tmp_path / "data", torch.load(tmp_path / "weights.pt"), [1, 2, 3, 5])


def _status(server: ServerProcess) -> str:
    shown = ema("status", "sharded", "--url", server.http)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def _check_replay(data: Path, weights: dict[int, dict[str, Tensor]], steps: list[int]) -> None:
    """The newest averages hold these steps, and equal a float64 replay of them."""
    generation = max((data / "runs" / "sharded" / "generations").iterdir())
    for average, decay in (("raw", 0.0), ("ema-0.9", 0.9)):
        ledger = json.loads((generation / "averages" / average / "version.json").read_text())["ledger"]
        assert ledger_steps(ledger) == steps
        expected = replay(ledger, decay, weights.__getitem__)
        found = load_file(generation / "averages" / average / "model.safetensors")
        assert largest_difference(found, expected) <= bound(ledger, decay, 8.0)


def test_nan_in_one_shard_is_one_gap_for_all_ranks(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        ranks = _train(server, twin=False, steps=5, nan=[1, 3], weights=str(tmp_path / "weights.pt"))
        assert [each["committed"] for each in ranks] == [4, 4]
        assert [each["dropped"] for each in ranks] == [{"not_finite": 1}] * 2
        assert server.get("/v1/runs/sharded")["gap_steps"] == 1
    _check_replay(tmp_path / "data", torch.load(tmp_path / "weights.pt"), [1, 2, 4, 5])
