"""The alternative to this project: an average in the trainer, updated after every step.

The arithmetic of timm's `ModelEmaV3.update` with a constant decay: in one call for all tensors on the model's device,
tensor by tensor if the average is on another device.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class ModelEma:
    """Keeps the average of `model` on the model's own device, or on `device`."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, device: torch.device | None = None) -> None:
        self._average = copy.deepcopy(model).eval().requires_grad_(False)
        if device is not None:
            self._average.to(device)
        self._decay = decay
        self._elsewhere = device

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Floats are interpolated, everything else is copied."""
        averages, weights = [], []
        for average, weight in zip(self._average.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point() and self._elsewhere is not None:
                average.lerp_(weight.to(self._elsewhere), 1.0 - self._decay)
            elif average.is_floating_point():
                averages.append(average)
                weights.append(weight)
            else:
                average.copy_(weight)
        if averages:
            torch._foreach_lerp_(averages, weights, weight=1.0 - self._decay)
