"""The averaging classes of other libraries, each with the rule of ours that must give the same average."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from support.libraries import library, taken_from
from support.real_timm import model_ema

Update = Callable[[int], None]
State = Callable[[], Mapping[str, Tensor]]
Begin = Callable[[nn.Module], tuple[Update, State]]


class Form(Enum):
    """How a library writes its update, which decides how float32 rounds it."""

    LERP = "average + w * (new - average)"
    SCALED = "d * average + (1 - d) * new"


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to average.

    Args:
        label: the call, as a user of the library writes it.
        rule: our rule.
        begin: starts it on a model; returns a function to call after each step and one for the average by name.
        decay: its final decay.
        form: form of the update.
        differs: names of tensors for which the library is known to be wrong, judged by its own profile.
        float32_decay: the library computes the decay itself in float32.
    """

    label: str
    rule: str
    begin: Begin
    decay: float
    form: Form = Form.LERP
    differs: tuple[str, ...] = ()
    float32_decay: bool = False


def _listed(model: nn.Module, shadow: list[Tensor]) -> dict[str, Tensor]:
    """Libraries that take a list of parameters return no names."""
    return {name: value for (name, _), value in zip(model.named_parameters(), shadow, strict=True)}


def timm(**given: Any) -> Begin:
    """`ModelEmaV3(model, ...).update(model, step=n)`, as timm's train.py calls it."""

    def begin(model: nn.Module) -> tuple[Update, State]:
        ema = model_ema().ModelEmaV3(model, **given)
        return lambda step: ema.update(model, step=step), ema.module.state_dict

    return begin


def timm_v2(**given: Any) -> Begin:
    """`ModelEmaV2(model, ...).update(model)`."""

    def begin(model: nn.Module) -> tuple[Update, State]:
        ema = model_ema().ModelEmaV2(model, **given)
        return lambda _: ema.update(model), ema.module.state_dict

    return begin


def averaged_model(on: Callable[[int], bool] = lambda _: True, **given: Any) -> Begin:
    """`torch.optim.swa_utils.AveragedModel(model, ...).update_parameters(model)`, at the steps that `on` selects."""

    def begin(model: nn.Module) -> tuple[Update, State]:
        ema = swa_utils.AveragedModel(model, **given)
        return lambda step: ema.update_parameters(model) if on(step) else None, ema.module.state_dict

    return begin


def diffusers(**given: Any) -> Begin:
    """`EMAModel(model.parameters(), ...).step(model.parameters())`."""

    def begin(model: nn.Module) -> tuple[Update, State]:
        found = taken_from(
            "diffusers",
            "training_utils.py",
            "EMAModel",
            torch=torch,
            contextlib=contextlib,
            copy=copy,
            is_transformers_available=lambda: False,
        )
        ema = found["EMAModel"](model.parameters(), **given)
        return lambda _: ema.step(model.parameters()), lambda: _listed(model, ema.shadow_params)

    return begin


def ema_pytorch(kind: str = "EMA", **given: Any) -> Begin:
    """`EMA(model, ...).update()` or `KarrasEMA(model, ...).update()`."""

    def begin(model: nn.Module) -> tuple[Update, State]:
        ema = getattr(library("ema_pytorch"), kind)(model, **given)
        return lambda _: ema.update(), ema.ema_model.state_dict

    return begin


def torch_ema(**given: Any) -> Begin:
    """`ExponentialMovingAverage(model.parameters(), ...).update()`."""

    def begin(model: nn.Module) -> tuple[Update, State]:
        ema = library("torch_ema").ExponentialMovingAverage(model.parameters(), **given)
        return lambda _: ema.update(), lambda: _listed(model, ema.shadow_params)

    return begin


def lightning(kind: str, **given: Any) -> Begin:
    """A callback of Lightning's, called as its trainer does after each batch."""

    def begin(model: nn.Module) -> tuple[Update, State]:
        found = taken_from(
            "pytorch_lightning",
            "callbacks/weight_averaging.py",
            "WeightAveraging",
            "EMAWeightAveraging",
            torch=torch,
            Callback=object,
            override=lambda method: method,
            is_overridden=lambda *_: False,
            AveragedModel=swa_utils.AveragedModel,
            get_ema_avg_fn=swa_utils.get_ema_avg_fn,
        )
        callback = found[kind](device="cpu", **given)
        trainer = SimpleNamespace(global_step=0, current_epoch=0)
        callback.setup(trainer, model, "fit")

        def update(step: int) -> None:
            trainer.global_step = step
            callback.on_train_batch_end(trainer, model, None, None, step - 1)

        return update, callback._average_model.module.state_dict

    return begin


def composer(half_life: int) -> Begin:
    """`compute_ema(model, parameters, smoothing)` as Composer's algorithm EMA calls it after each batch.

    Like the algorithm with `ema_start="0ba"` and `update_interval="1ba"` it begins with a copy after the first batch.
    """

    def begin(model: nn.Module) -> tuple[Update, State]:
        found = taken_from(
            "composer",
            "algorithms/ema/ema.py",
            "compute_ema",
            "EMAParameters",
            "get_model_context_manager",
            torch=torch,
            contextlib=contextlib,
            itertools=itertools,
            misc=SimpleNamespace(is_model_fsdp=lambda _: False),
        )
        kept: list[Any] = []

        def update(_: int) -> None:
            if not kept:
                kept.append(found["EMAParameters"](model))
            found["compute_ema"](model, kept[0], 2 ** (-1 / half_life))

        return update, lambda: {**kept[0].named_parameters_dict, **kept[0].named_buffers_dict}

    return begin


def torchvision(decay: float) -> Begin:
    """ExponentialMovingAverage of torchvision's training reference: torch's class with its own averaging function."""

    def average(averaged: Tensor, new: Tensor, _: Tensor | int) -> Tensor:
        return decay * averaged + (1 - decay) * new

    return averaged_model(avg_fn=average, use_buffers=True)
