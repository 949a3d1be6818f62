"""Averages over real processes: added and removed over HTTP, unchanged by kills, equal to their ledgers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader import Reader, Version
from support.oracle import EPS32
from support.processes import ServerProcess
from support.toy import Toy, replay
from support.waiting import eventually
from trainer_client import EmaClient

_RULES = (
    "raw",
    "ema:0.9",
    "ema:0.999,warmup=timm,buffers=copy",
    "ema:half_life=50,warmup=tf,acc=float64",
    "ema:0.99,warmup=debias,exclude=first.*,name=partial",
    "power:sigma_rel=0.05",
    "swa:start=2,every=3",
    "window:3",
    "window:4,every=2,acc=float64",
    "wsd:start=3,steps=6,shape=cosine",
)


def _client(server: ServerProcess, run: str, averages: tuple[str, ...] = ("ema:0.5", "raw"), **given: Any) -> EmaClient:
    return EmaClient(server.zmq, run, averages=averages, when_behind="wait", **given)


def _ema(*arguments: str) -> str:
    """The output of a command, run in this process, which is faster."""
    result = CliRunner().invoke(build(), list(arguments))
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def _ledger(server: ServerProcess, version: Version) -> dict[str, Any]:
    content = server.get(f"/v1/runs/{version.run}/averages/{version.average}/versions/{version.id}/files/version.json")
    ledger: dict[str, Any] = content["ledger"]
    return ledger


def _furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    floats = [name for name, value in one.items() if value.is_floating_point() and name != "mask"]
    return max((one[name].double() - other[name].double()).abs().max().item() for name in floats)


def test_averages_are_added_and_removed_across_a_kill_while_streaming(tmp_path: Path) -> None:
    """Added and removed just before the kill, with no snapshot in between; the trainer comes back with its old list."""
    model, step = Toy(), 0
    first = ServerProcess(tmp_path / "data")
    with first, _client(first, "r") as client:
        for step in (1, 2, 3):
            client.update(model.at(step), step)
        assert client.flush()
        with Reader(first.http) as reader:
            assert reader.averages.add("r", "ema:0.9").step is None
            reader.averages.add("r", "window:2", "last")
            reader.averages.remove("r", "raw")
        first.kill()
        with ServerProcess(tmp_path / "data", zmq=first.zmq, http=first.http_address) as second:
            with Reader(second.http) as reader:
                assert [average.name for average in reader.averages.of("r")] == ["ema-0.5", "ema-0.9", "last"]
            eventually(lambda: client.stats()["reconnects"] == 1, "the trainer is back", 60.0)
            for step in (4, 5, 6):
                client.update(model.at(step), step)
            assert client.flush(durable=True)
            with Reader(second.http) as reader:
                for average, spec in (("ema-0.5", "ema:0.5"), ("ema-0.9", "ema:0.9")):
                    version = reader.version("r", average)
                    expected = replay(_ledger(second, version), spec)
                    assert _furthest(expected, reader.load(version)) < 1e-5, average
                assert _ledger(second, reader.version("r", "ema-0.9")) == {
                    "origin": 3,
                    "set": [4],
                    "ranges": [[4, 6, 1]],
                }
                assert reader.averages.ledger("r", "last").steps == ((6, 0.5), (5, 0.5))
                assert reader.averages.ledger("r", "ema-0.5").decay == pytest.approx(0.5)
                reader.averages.remove("r", "last")
                listed = _ema("averages", "r", "--add", "swa", "--url", second.http).splitlines()
            assert client.finish()
    assert [line.split()[0] for line in listed[:4]] == ["name", "ema-0.5", "ema-0.9", "swa"]


@pytest.mark.usefixtures("lane")
def test_every_rule_continues_bit_for_bit_after_a_kill_and_equals_its_ledger(tmp_path: Path) -> None:
    """Rebuilt in float64 from what `ema ledger --json` prints and the trainer's own snapshots."""
    before, after = (1, 2, 3, 4, 7, 8), (9, 11, 12)
    with ServerProcess(tmp_path / "data") as first, _client(first, "broken", _RULES) as client:
        _stream(client, before)
        first.kill()
        with ServerProcess(tmp_path / "data", zmq=first.zmq, http=first.http_address) as second:
            eventually(lambda: client.stats()["reconnects"] == 1, "the trainer is back", 60.0)
            _stream(client, after)
            with _client(second, "whole", _RULES) as uninterrupted:
                _stream(uninterrupted, before + after)
            with Reader(second.http) as reader:
                for average in reader.averages.of("broken"):
                    one, two = (reader.version(run, average.name) for run in ("broken", "whole"))
                    assert one.file("model.safetensors") == two.file("model.safetensors"), average
                    assert one.file("state.safetensors") == two.file("state.safetensors"), average
                    assert _ledger(second, one) == _ledger(second, two), average
                    _check_rebuilt(second, average.name, reader.load(one)["norm.weight"])
            assert client.finish()


def _stream(client: EmaClient, steps: tuple[int, ...]) -> None:
    model = Toy()
    for step in steps:
        client.update(model.at(step), step)
    assert client.flush(durable=True)


def _check_rebuilt(server: ServerProcess, average: str, held: Tensor) -> None:
    ledger = json.loads(_ema("ledger", f"broken/{average}", "--url", server.http, "--json"))
    assert sum(share for _, share in ledger["steps"]) + ledger["rest"] == pytest.approx(1.0, abs=1e-12)
    rebuilt = torch.zeros(48, dtype=torch.float64)
    for step, share in ledger["steps"]:
        rebuilt += share * Toy().at(step).norm.weight.detach().double()
    assert (held.double() - rebuilt).abs().max().item() <= 100 * EPS32, average
