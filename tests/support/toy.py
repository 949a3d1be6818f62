"""A model whose weights after step N are a function of N, so that any process can compute the expected average.

`replay` is the oracle: a loop in float64 over a ledger, with its own parser of the rule strings. It shares no code
with the server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Toy(nn.Module):
    """Parameters of two dtypes, a tied pair, a frozen one, float and integer buffers, a mask with -inf."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.first.weight
        self.narrow = nn.Parameter(torch.zeros(width, 5, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.norm = nn.BatchNorm1d(width)
        self.mask: Tensor
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

    def at(self, step: int) -> Toy:
        """Take the weights of `step`."""
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for tensor in (self.first.weight, self.first.bias, self.norm.weight, self.norm.bias):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            self.narrow.copy_(torch.randn(self.narrow.shape, generator=generator))
            running = (self.norm.running_mean, self.norm.running_var, self.norm.num_batches_tracked)
            for buffer in running:
                if buffer is not None:
                    buffer.fill_(torch.randn((), generator=generator).item() if buffer.is_floating_point() else step)
        return self


def replay(ledger: dict[str, Any], spec: str) -> dict[str, Tensor]:
    """The average after a ledger's last step, in float64, over the toy's weights."""
    rule, _, parameter = spec.partition(":")
    model, average, before = Toy(), {}, 0
    for step in ledger_steps(ledger):
        state = model.at(step).state_dict()
        for name, tensor in state.items():
            new = tensor.double().clone()
            if rule == "raw" or step in ledger["set"] or not tensor.is_floating_point() or name == "mask":
                average[name] = new
            else:
                kept = float(parameter) ** (step - before)
                average[name] = kept * average[name] + (1 - kept) * new
        before = step
    return average


def ledger_steps(ledger: dict[str, Any]) -> Iterator[int]:
    """The steps of a ledger."""
    for first, last, stride in ledger["ranges"]:
        yield from range(first, last + 1, stride)


def check_version(folder: Path) -> dict[str, Any]:
    """Compare the version in `folder` with the oracle; returns its version.json.

    float32 lerp errs by at most half an ulp of the result and of the product in each of the last 1 / (1 - decay) steps
    that still count: with values below 8 that is under 8 * 2**-23 * 2 / (1 - decay); bfloat16 weights are exact in it.
    """
    about: dict[str, Any] = json.loads((folder / "version.json").read_text())
    found, expected = load_file(folder / "model.safetensors"), replay(about["ledger"], about["spec"])
    assert found.keys() == expected.keys()
    _, _, parameter = about["spec"].partition(":")
    bound = 8 * 2**-23 * 2 / (1 - float(parameter)) if parameter else 0.0
    for name, tensor in found.items():
        finite = expected[name].isfinite()
        assert torch.equal(tensor.double()[~finite], expected[name][~finite])
        difference = (tensor.double()[finite] - expected[name][finite]).abs()
        worst = difference.max().item() if difference.numel() else 0.0
        assert worst <= bound, f"{folder}: {name} differs by {worst} (bound {bound})"
    return about
