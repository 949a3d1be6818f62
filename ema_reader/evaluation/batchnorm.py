"""Recomputes BatchNorm statistics for averaged weights.

Averaged weights produce other activations than the weights of any training step, so averaged or copied statistics do
not fit them. As in `torch.optim.swa_utils.update_bn`, the statistics are means over batches; here every other layer is
in evaluation mode, and more kinds of batches are accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema_reader.errors import RecalibrationFailed
from ema_reader.evaluation.user_function import Evaluate

log = logging.getLogger(__name__)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Loader = Callable[[], tuple[nn.Module, Iterable[Any]]]


def recalibrating(function: Evaluate, name: str, loader: Loader) -> Evaluate:
    """An evaluation function that receives the weights with statistics recomputed by `loader`; see `recomputed`."""

    def evaluate(state: dict[str, Tensor]) -> Mapping[str, Any]:
        return function({**state, **recomputed(state, name, loader)})

    return evaluate


def recomputed(state: Mapping[str, Tensor], name: str, loader: Loader) -> dict[str, Tensor]:
    """The statistics of every BatchNorm layer under these weights: means over the batches of the mean and the variance.

    Layers that no batch reaches keep their statistics. The model gets the weights and moves to their device; its modes
    and momenta are restored. No gradient is computed. The variance is the unbiased one, as torch's is.

    Args:
        state: the weights, as `state_dict` names them, all on one device. Not changed.
        name: the loader's name in messages.
        loader: returns the model, whose values do not matter, and a finite iterable of batches. See `arguments_of`.

    Returns:
        Tensors by name, with the shape and dtype of `state`: `running_mean`, `running_var` and `num_batches_tracked`
        (the number of batches) of every layer that was reached.

    Raises:
        RecalibrationFailed: loader or model raised, or there is no batch or no such layer; the text has `name`.
    """
    try:
        model, batches = _made_by(loader)
        device = next(iter(state.values())).device
        model.load_state_dict(state)
        return _recomputed(model.to(device), batches, device, state)
    except RecalibrationFailed as failure:
        raise RecalibrationFailed(f"{name}: {failure}") from None
    except Exception as failure:  # the user's code may raise anything
        raise RecalibrationFailed(f"{name}: {type(failure).__name__}: {failure}") from failure


def arguments_of(batch: object, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model for a batch, positional and by name, on `device`.

    Of a tuple or list the first element is used; the others are labels. If that is a tuple or list again, its
    elements are positional arguments; a mapping is passed by name; anything else is the only argument.

    Raises:
        RecalibrationFailed: the batch is an empty tuple or list.
    """
    inputs = batch
    if isinstance(batch, tuple | list):
        if not batch:
            raise RecalibrationFailed(
                "a batch is empty: yield tensors, (inputs, labels), or dicts of the model's arguments"
            )
        inputs = batch[0]
    moved = _moved(inputs, device)
    if isinstance(moved, Mapping):
        return (), {str(key): value for key, value in moved.items()}
    return (tuple(moved), {}) if isinstance(moved, tuple | list) else ((moved,), {})


def _made_by(loader: Loader) -> tuple[nn.Module, Iterable[Any]]:
    made: object = loader()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise RecalibrationFailed(
            f"it returned {type(made).__name__}: return (model, batches), a module and an iterable"
        )
    if not isinstance(made[1], Iterable):
        raise RecalibrationFailed(f"the batches are {type(made[1]).__name__}, which is not iterable")
    return made[0], made[1]


def _recomputed(
    model: nn.Module, batches: Iterable[Any], device: torch.device, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    if not layers:
        raise RecalibrationFailed(f"{type(model).__name__} has no BatchNorm layer with running statistics")
    count, called = 0, ""
    with torch.no_grad(), _counting(model, layers):
        for batch in batches:
            positional, named = arguments_of(batch, device)
            model(*positional, **named)
            count, called = count + 1, called or ", ".join([*map(_shown, positional), *named])
        reached = [layer for layer in layers if layer.num_batches_tracked]
    if not count:
        raise RecalibrationFailed("the loader yields no batch: yield at least one; more are better")
    log.info("recomputed %d of %d layers over %d batches; called with (%s)", len(reached), len(layers), count, called)
    return {name: _like(name, tensor, state[name]) for name, tensor in _statistics(model, reached)}


@contextmanager
def _counting(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let `layers`, and nothing else in `model`, compute the plain mean over batches; restores modes and momenta."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    known = [(getattr(layer, name), getattr(layer, name).clone(), layer) for layer in layers for name in _STATISTICS]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative
        layer.training = True  # not train(): modules inside the layer, such as dropout, stay in evaluation mode
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
        unreached = [layer for layer in layers if not layer.num_batches_tracked]
        for buffer, old, layer in known:
            if layer in unreached:
                buffer.copy_(old)


def _statistics(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[tuple[str, Tensor]]:
    """Names as in the state dict, including every name of a layer that is used twice."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if any(module is layer for layer in layers):
            for name in _STATISTICS:
                yield f"{prefix}.{name}".removeprefix("."), getattr(module, name)


def _like(name: str, tensor: Tensor, known: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise RecalibrationFailed(f"{name} is not finite: the batches or the weights make NaN or Inf before this layer")
    return tensor.detach().to(known.dtype, copy=True)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_moved(item, device) for item in value]
    return value.to(device) if hasattr(value, "to") else value


def _shown(argument: object) -> str:
    return str(list(argument.shape)) if isinstance(argument, Tensor) else type(argument).__name__
