"""The demo's replay is compared with loops over Python's exact fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ema_cli.demo import record as records
from ema_cli.demo.replay import largest_difference

_STEPS = 40
_DECAY = "0.9"


def _states() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {"weight": torch.randn(2, 3, generator=generator), "count": torch.tensor(step), "bias": torch.randn(1)}
        for step in range(1, _STEPS + 1)
    ]


def _write(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    with records.RecordWriter(folder) as record:
        for state in states:
            record.append(state)


def _exact(states: list[dict[str, torch.Tensor]], name: str, updates: list[int], replaced: set[int]) -> torch.Tensor:
    """The ema of one tensor over the steps in `updates`, in fractions."""
    decay, before = Fraction(_DECAY), 0
    average: list[Fraction] = []
    for step in updates:
        weights = [Fraction(value) for value in states[step - 1][name].flatten().tolist()]
        if step in replaced or not states[0][name].is_floating_point():
            average = weights
        else:
            keep = decay ** (step - before)
            average = [keep * old + (1 - keep) * new for old, new in zip(average, weights, strict=True)]
        before = step
    return torch.tensor([float(value) for value in average], dtype=torch.float64).reshape(states[0][name].shape)


def _version(folder: Path, spec: str, ledger: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "version.json").write_text(json.dumps({"spec": spec, "ledger": ledger}))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("ledger", "updates"),
    [
        ({"origin": 0, "set": [1], "ranges": [[1, 40, 1]]}, list(range(1, 41))),
        ({"origin": 0, "set": [1], "ranges": [[1, 10, 1], [13, 25, 4], [26, 40, 1]]}, None),
        ({"origin": 0, "set": [2, 20], "ranges": [[2, 40, 2]]}, list(range(2, 41, 2))),
    ],
    ids=["every step", "gaps", "replaced on the way"],
)
def test_replay_is_exact_to_float64(tmp_path: Path, ledger: dict[str, Any], updates: list[int] | None) -> None:
    steps = updates or [*range(1, 11), 13, 17, 21, 25, *range(26, 41)]
    states = _states()
    _write(tmp_path / "record", states)
    exact = {name: _exact(states, name, steps, set(ledger["set"])) for name in states[0]}
    version = _version(tmp_path / "version", f"ema:{_DECAY}", ledger, exact)

    assert largest_difference(version, tmp_path / "record") < 1e-14


def test_raw_is_the_last_weights(tmp_path: Path) -> None:
    states = _states()
    _write(tmp_path / "record", states)
    ledger = {"origin": 0, "set": [1], "ranges": [[1, 39, 1]]}
    version = _version(tmp_path / "version", "raw", ledger, states[38])

    assert largest_difference(version, tmp_path / "record") == 0.0


@pytest.mark.parametrize(("name", "wrong"), [("weight", 1e-6), ("bias", -1e-3), ("count", 1)])
def test_one_wrong_value_in_any_tensor_is_the_difference(tmp_path: Path, name: str, wrong: float) -> None:
    states = _states()
    _write(tmp_path / "record", states)
    ledger = {"origin": 0, "set": [1], "ranges": [[1, 40, 1]]}
    weights = {key: _exact(states, key, list(range(1, 41)), {1}) for key in states[0]}
    largest = weights[name].abs().max().item()
    weights[name].view(-1)[-1] += wrong
    version = _version(tmp_path / "version", f"ema:{_DECAY}", ledger, weights)

    assert largest_difference(version, tmp_path / "record") == pytest.approx(abs(wrong) / largest, rel=1e-5)


def test_record_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    states = _states()
    _write(tmp_path / "record", states)

    columns, rows = records.read(tmp_path / "record")

    assert [(column.name, column.is_float) for column in columns] == [
        ("weight", True),
        ("count", False),
        ("bias", True),
    ]
    for state, row in zip(states, rows, strict=True):
        for column in columns:
            values = torch.tensor(row[column.start : column.stop])
            assert torch.equal(values, state[column.name].flatten().float())
