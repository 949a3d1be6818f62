"""Compares a downloaded version with a float64 replay of its ledger over the trainer's own record.

It shares no code with the server: the ledger says which steps updated the average, and the rule is applied again here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from ema_cli.demo.record import Column, Rows, read
from ema_proto.averages.rules import Ema
from ema_proto.averages.specs import parse_average

Values = npt.NDArray[np.float64]


def largest_difference(version: Path, record: Path) -> float:
    """Compare all tensors of the version in the folder `version` with a replay over `record`.

    Returns:
        The largest difference of any value, relative to the largest value of its tensor (batch norm's variances are
        hundreds of times larger than weights, and float32 rounds in proportion). Integers count as values.

    Raises:
        OSError: a file is missing.
        KeyError: the version lacks a tensor of the record.
        ValueError: the version's decay is not constant.
    """
    about = json.loads((version / "version.json").read_text())
    columns, rows = read(record)
    expected = replay(about["ledger"], about["spec"], columns, rows)
    with safe_open(version / "model.safetensors", framework="pt") as weights:
        return max(_difference(weights.get_tensor(column.name), expected, column) for column in columns)


def replay(ledger: Mapping[str, Any], spec: str, columns: tuple[Column, ...], rows: Rows) -> Values:
    """The average after the last step of `ledger`, in float64, over all columns.

    An EMA moves towards the weights by `1 - decay ** delta`, delta being the number of steps since the last update.
    Integers, `raw`, and steps that replaced the average copy the weights.
    """
    rule, replaced, steps = parse_average(spec), set(ledger["set"]), _steps(ledger)
    average: Values = rows[steps[-1] - 1].astype(np.float64)
    if not isinstance(rule, Ema):
        return average
    if rule.decay is None or rule.warmup is not None:
        raise ValueError(f"{spec} has no constant decay: this replay supports no other")
    copied = np.concatenate([np.full(column.stop - column.start, not column.is_float) for column in columns])
    newest, before = average[copied], 0
    for step in steps:
        weights = rows[step - 1].astype(np.float64)
        if step in replaced:
            average = weights
        else:
            average += (1.0 - rule.decay ** (step - before)) * (weights - average)
        before = step
    average[copied] = newest
    return average


def _steps(ledger: Mapping[str, Any]) -> list[int]:
    return [step for first, last, stride in ledger["ranges"] for step in range(first, last + 1, stride)]


def _difference(tensor: torch.Tensor, expected: Values, column: Column) -> float:
    wanted = torch.from_numpy(expected[column.start : column.stop])
    largest = float(wanted.abs().max())
    return float((tensor.reshape(-1).double() - wanted).abs().max()) / (largest if largest > 0 else 1.0)
