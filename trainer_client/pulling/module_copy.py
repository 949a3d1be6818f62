"""`ModuleCopy`: a copy of the trained model, in eval mode, that holds averaged weights, for validation and saving.

Its tensors are filled in place, so that references to it see the new weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer_client.errors import PlanError
from trainer_client.model.adapters import adapter_names
from trainer_client.model.wrappers import canonical_names, wrapped_attribute
from trainer_client.pulling.tensors import renamed

_PREFIX = "module."
_CPU = torch.device("cpu")


class ModuleCopy:
    """`module`: a copy of `model` without its wrappers and without gradients.

    It is on `device` while it is used and otherwise on the CPU, so that no accelerator holds
    a second copy of the model while it trains.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        while (hidden := wrapped_attribute(model, "")) is not None:
            model = getattr(model, hidden)
        known: dict[int, Any] = {id(tensor): _held(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.module = copy.deepcopy(model, known).eval()
        self._device = device
        self._is_shown = device == _CPU

    def shown(self) -> nn.Module:
        """The module, on its device."""
        if not self._is_shown:
            self.module.to(self._device)
            self._is_shown = True
        return self.module

    def put_away(self) -> None:
        """Free the device."""
        if self._is_shown and self._device != _CPU:
            self.module.to(_CPU)
            self._is_shown = False

    def take(self, model: nn.Module) -> None:
        """Make the copy equal to `model`."""
        entries = model.state_dict()
        self.fill(dict(zip(canonical_names(model, entries), entries.values(), strict=True)))

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the existing tensors. Of a model with adapters, weights of the active one are enough.

        Raises:
            PlanError: a tensor is missing, or has another shape.
        """
        names = adapter_names(self.module)
        weights = renamed(weights, names)
        with torch.no_grad():
            entries = self.module.state_dict()
            for name, held in zip(canonical_names(self.module, entries), entries.values(), strict=True):
                if names and name not in weights and name not in names.values():
                    continue
                if name not in weights or weights[name].shape != held.shape:
                    raise PlanError(f"the average does not fit this model: {name!r} is missing or has another shape")
                held.copy_(weights[name])

    def load(self, state: Mapping[str, Any], *, strict: bool) -> Any:
        """Load a state dict of the module, or one whose names begin with `module.`, as in timm's averaging classes."""
        if not set(self.module.state_dict()) <= set(state):
            state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
        return self.module.load_state_dict(state, strict=strict)

    def state_dict(self, destination: dict[str, Any] | None, prefix: str, *, keep_vars: bool) -> dict[str, Any]:
        """The state dict, its names beginning with `module.`."""
        prefix += _PREFIX
        if destination is None:
            return dict(self.module.state_dict(prefix=prefix, keep_vars=keep_vars))
        return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


def _held(tensor: Tensor) -> Tensor:
    held = tensor.detach().to(_CPU, copy=True)
    return nn.Parameter(held, requires_grad=False) if isinstance(tensor, nn.Parameter) else held
