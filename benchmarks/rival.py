"""What a trainer does without this project: the average beside the model, updated after every step.

The arithmetic of timm's `ModelEmaV3.update` with a constant decay and `foreach=True`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class ModelEma:
    """Keeps the average of `model` on the model's own device."""

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self._average = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Floats are interpolated, everything else is copied."""
        averages, weights = [], []
        for average, weight in zip(self._average.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                averages.append(average)
                weights.append(weight)
            else:
                average.copy_(weight)
        torch._foreach_lerp_(averages, weights, weight=1.0 - self._decay)
