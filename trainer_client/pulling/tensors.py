"""Averaged weights in the tensors of a module: whether they fit, and the copy in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainer_client.errors import PlanError
from trainer_client.model.wrappers import canonical_names

log = logging.getLogger("ema")

_SHOWN: Final = 3


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, by their names without the prefixes of wrappers.

    Raises:
        PlanError: one of them cannot be written as a whole: it is sharded, or has no values (meta device).
    """
    entries = module.state_dict()
    named = zip(canonical_names(module, entries), entries.values(), strict=True)
    found = {name: value for name, value in named if isinstance(value, Tensor)}
    for name, tensor in found.items():
        if tensor.is_meta or _is_wrapper(tensor):
            kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
            raise PlanError(f"averages cannot be copied into tensor {name!r}: it is {kind}, not a plain tensor")
    if not found:
        raise PlanError("averages cannot be copied into a module without parameters and buffers")
    return found


def check_fit(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    """Check that each tensor of an average has a place in a module; return the module's tensors that it lacks.

    Args:
        weights: the average.
        shapes: those of the module's tensors, by name.

    Raises:
        PlanError: a tensor has no place, or the place has another shape.
    """
    for name, tensor in weights.items():
        if name not in shapes:
            raise PlanError(f"the average does not fit this module: {name!r} is not in the module")
        if tensor.shape != shapes[name]:
            raise PlanError(
                f"the average does not fit this module: {name!r} is {list(tensor.shape)} in the average and "
                f"{list(shapes[name])} in the module"
            )
    return [name for name in shapes if name not in weights]


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights with other names where `names` has one."""
    return {names.get(name, name): value for name, value in weights.items()}


def copy_into(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write all of `weights` into the tensors of `module`, which keep their device, dtype and memory.

    Raises:
        PlanError: the weights do not fit; nothing was written.
    """
    tensors = tensors_of(module)
    check_fit(weights, {name: tensor.shape for name, tensor in tensors.items()})
    with torch.no_grad():
        for name, value in weights.items():
            tensors[name].copy_(value)


def shown(names: list[str]) -> str:
    """The first of some names, and how many there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _is_wrapper(tensor: object) -> bool:  # not inline: torch's type guard makes the code after it unreachable
    return is_traceable_wrapper_subclass(tensor)
