"""A small model with everything that averaging libraries treat differently, moved at random, with its full history."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS = 1000
LARGEST = 2.0  # of the randomly moved weights


class ParityModel(nn.Module):
    """Convolution, batch norm, tied weights, dtypes, integers, and a tensor whose average is the list of step weights.

    `profile` is 1 at the index of the step (0: the initial weights) and 0 elsewhere. So its average is the list of the
    weights of the steps in the average, in float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.narrow = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.full((7,), 1.0 / 3.0), requires_grad=False)
        self.profile = nn.Parameter(torch.zeros(STEPS + 2, dtype=torch.float64))
        self.index: Tensor
        self.register_buffer("index", torch.arange(169))


class ProfileModel(nn.Module):
    """Only that tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.profile = nn.Parameter(torch.zeros(STEPS + 2, dtype=torch.float64))

    def at(self, step: int) -> ProfileModel:
        """Take the weights of `step`."""
        with torch.no_grad():
            self.profile.zero_()[step] = 1.0
        return self


class Walk:
    """The random walk of the model; `history` has its weights after each step, with the initial ones at 0."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = ParityModel()
        self._walking = [
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and name != "profile"
        ]
        self.history: list[dict[str, Tensor]] = []
        self._stacked: dict[str, Tensor] = {}
        self._at(0)

    def step(self) -> int:
        """Take a step, and return its number."""
        number = len(self.history)
        with torch.no_grad():
            self.model.norm(2 * torch.randn(8, 4, 2, 2) + number / STEPS)
            for parameter in self._walking:
                parameter.add_(torch.randn_like(parameter), alpha=0.02).clamp_(-LARGEST, LARGEST)
        self._at(number)
        return number

    def exact(self, profile: Tensor, name: str) -> Tensor:
        """The average of a tensor that has these weights, in float64."""
        values = self.values(name)
        average: Tensor = torch.tensordot(profile[: len(values)], values, dims=1)
        return average

    def values(self, name: str) -> Tensor:
        """A tensor at all steps, in float64, stacked; valid after the walk."""
        if name not in self._stacked:
            self._stacked[name] = torch.stack([state[name].double() for state in self.history])
        return self._stacked[name]

    def _at(self, number: int) -> None:
        with torch.no_grad():
            self.model.profile.zero_()[number] = 1.0
        state: Mapping[str, Tensor] = self.model.state_dict()
        self.history.append({name: value.clone() for name, value in state.items()})


class Walker(Optimizer):
    """The walk as an optimizer, so that a client can be attached to it."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(walk.model.parameters(), {})
        self._walk = walk

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step."""
        self._walk.step()
