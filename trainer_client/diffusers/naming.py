"""The names of a list of parameters: `EMAModel` is given no more than `model.parameters()`.

A snapshot is taken of a module, so that is what a list of parameters becomes here.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import GeneratorType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from trainer_client.errors import PlanError
from trainer_client.model.wrappers import canonical_names, wrapped_attribute

log = logging.getLogger("ema")

Names: TypeAlias = tuple[str, ...]  # of one parameter; more than one if it is tied

_UNKNOWN = "parameter"


class Naming:
    """Finds a module with names for a list of parameters.

    Args:
        template: a module with the same parameters, if one is known: its names are used, in its order.
    """

    def __init__(self, template: nn.Module | None) -> None:
        self._names = None if template is None else _names_of(template)
        self._named: Named | None = None

    def module_of(self, parameters: Iterable[Tensor], model: nn.Module | None = None) -> nn.Module:
        """A module with these parameters, in this order.

        That is the module whose `parameters()` they are, if that is known; `model`, if they are its own; or a new one.

        Raises:
            PlanError: they are not those of the template.
        """
        owner = owner_of(parameters)
        if owner is not None:
            return owner
        tensors = list(parameters)
        if model is not None and list(map(id, model.parameters())) == list(map(id, tensors)):
            return model
        if self._named is None:
            self._named = Named(_numbered(tensors) if self._names is None else self._names)
        self._named.bind(tensors)
        return self._named


class Named(nn.Module):
    """A tree of plain modules that gives parameters their names.

    Args:
        names: shape of each parameter by its names, in the order of `parameters()`.
    """

    def __init__(self, names: Mapping[Names, torch.Size]) -> None:
        super().__init__()
        self._shapes = dict(names)

    def bind(self, parameters: Sequence[Tensor]) -> None:
        """Have these be the parameters from now on.

        Raises:
            PlanError: their number or the shape of one differs from the names'; nothing was changed.
        """
        check_fit(parameters, self._shapes)
        for names, tensor in zip(self._shapes, parameters, strict=True):
            value = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, tensor.requires_grad)
            for name in names:
                _set_parameter(self, name, value)


def owner_of(parameters: Iterable[Tensor]) -> nn.Module | None:
    """The module whose `parameters()` this is; None for anything else, and if it was iterated over already."""
    if not isinstance(parameters, GeneratorType) or parameters.gi_code is not nn.Module.parameters.__code__:
        return None
    if inspect.getgeneratorstate(parameters) != inspect.GEN_CREATED:
        return None
    given = inspect.getgeneratorlocals(parameters)
    return given["self"] if given["recurse"] else None


def parameter_names(module: nn.Module) -> list[str]:
    """The canonical name of each of `module.parameters()`, the first one of a tied one."""
    return [names[0] for names in _names_of(module)]


def check_fit(tensors: Sequence[Tensor], names: Mapping[Names, torch.Size]) -> None:
    """Check that tensors have the shapes of these names.

    Raises:
        PlanError: their number is another, or one has another shape, which is named.
    """
    if len(tensors) != len(names):
        raise PlanError(f"{len(tensors)} parameters were given, and the average has {len(names)}: give the same ones")
    for (group, shape), tensor in zip(names.items(), tensors, strict=True):
        if tensor.shape != shape:
            raise PlanError(f"parameter {group[0]!r} is of shape {list(shape)}, and {list(tensor.shape)} was given")


def template_of(
    parameters: Iterable[Tensor],
    model: nn.Module | None,
    model_cls: Any | None,
    model_config: Mapping[str, Any] | None,
) -> nn.Module | None:
    """The module that gives the parameters their names; None if nothing is known.

    That is `model`, or the module whose `parameters()` was called, or one of `model_cls`, made on the meta device.
    """
    if model is not None:
        return model
    owner = owner_of(parameters)
    if owner is not None or model_cls is None or model_config is None:
        return owner
    with torch.device("meta"):
        made: nn.Module = model_cls.from_config(model_config)
    return made


def config_of(module: nn.Module | None) -> dict[str, Any] | None:
    """What diffusers writes as the `config.json` of this model; None if it is not one of diffusers' models."""
    while module is not None and (hidden := wrapped_attribute(module, "")) is not None:
        module = getattr(module, hidden)
    to_json = getattr(module, "to_json_string", None)
    return None if to_json is None else json.loads(to_json())


def with_weights(module: nn.Module, weights: Sequence[Tensor]) -> nn.Module:
    """A module with the names, dtypes and buffers of `module`, and `weights` as its parameters.

    Raises:
        PlanError: they do not fit.
    """
    names = _names_of(module)
    check_fit(weights, names)
    values: dict[str, nn.Parameter] = {}
    for group, weight, own in zip(names, weights, module.parameters(), strict=True):
        value = nn.Parameter(weight.detach().to(own.dtype), requires_grad=own.requires_grad)
        values |= dict.fromkeys(group, value)
    made = nn.Module()
    entries = module.state_dict()
    for name, held in zip(canonical_names(module, entries), entries.values(), strict=True):
        if name in values:
            _set_parameter(made, name, values[name])
        elif isinstance(held, Tensor):
            path, _, attribute = name.rpartition(".")
            _module_at(made, path)._buffers[attribute] = held
    return made


def _names_of(module: nn.Module) -> dict[Names, torch.Size]:
    names: dict[int, list[str]] = {}
    shapes: dict[int, torch.Size] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in zip(canonical_names(module, parameters), parameters.values(), strict=True):
        names.setdefault(id(tensor), []).append(name)
        shapes[id(tensor)] = tensor.shape
    return {tuple(each): shapes[key] for key, each in names.items()}


def _module_at(module: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        child = module._modules.get(part)
        if child is None:
            child = module._modules[part] = nn.Module()
        module = child
    return module


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    # Not by register_parameter, which refuses names that nn.Module has, such as `type`.
    _module_at(module, path)._parameters[attribute] = value


def _numbered(tensors: Sequence[Tensor]) -> dict[Names, torch.Size]:
    log.warning("ema: the parameters get numbers as names: pass model=, or model.parameters() itself and not a list")
    return {(f"{_UNKNOWN}.{index}",): tensor.shape for index, tensor in enumerate(tensors)}
