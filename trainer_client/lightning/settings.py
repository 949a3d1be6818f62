"""The constructor's arguments of `EmaCallback` that are not those of `EmaClient`, validated."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ema_proto.averages.rules import AverageSpec, Ema
from ema_proto.averages.specs import parse_averages
from ema_proto.errors import LocalProtocolError
from trainer_client.client import EmaClient
from trainer_client.errors import SettingsError
from trainer_client.settings import Settings, check_step

_CLIENT = inspect.signature(EmaClient).parameters


@dataclass(frozen=True, slots=True)
class Decay:
    """The arguments of Lightning's `EMAWeightAveraging` that say how to average.

    Attributes:
        decay: for each update; there is one every `every` steps.
        every: see `decay`.
        after_step: the average is a copy of the weights for so many steps.
        after_epoch: it is one for so many epochs; None if `after_step` says so.
        buffers: how to treat buffers.
    """

    decay: float
    every: int
    after_step: int
    after_epoch: int | None
    buffers: Literal["average", "copy"]

    def rules(self, steps_per_epoch: float | None) -> tuple[AverageSpec, ...]:
        """The weights as they are, and the average, with the name `ema`.

        Raises:
            SettingsError: the decay is out of range, or the length of an epoch is required and unknown.
        """
        after = self.after_step
        if self.after_epoch is not None:
            if steps_per_epoch is None:
                raise SettingsError(
                    "update_starting_at_epoch needs the number of steps of an epoch, and the training dataloader has "
                    "no length: pass steps_per_epoch="
                )
            after = self.after_epoch * int(steps_per_epoch)
        try:
            # Over `every` steps that are one update, the decays of the steps multiply to that of the update.
            ema = Ema(self.decay ** (1 / self.every), "ema", update_after=after, buffers=self.buffers)
            return parse_averages(["raw", ema])
        except (LocalProtocolError, TypeError) as error:
            raise SettingsError(f"decay={self.decay!r} cannot be used: {error}") from None


def decay_of(
    decay: float | None, every: int, after_step: int | None, after_epoch: int | None, *, use_buffers: bool
) -> Decay | None:
    """The arguments that `decay` brings with it; None if there is no decay.

    Raises:
        SettingsError: one of them is out of range, or given without `decay`.
    """
    given = {"update_starting_at_step": after_step, "update_starting_at_epoch": after_epoch}
    starts = {name: check_step(name, value, 0) for name, value in given.items() if value is not None}
    if decay is None:
        lone = [*starts, *([] if use_buffers else ["use_buffers"])]
        if lone:
            raise SettingsError(
                f"{lone[0]} needs decay=; in averages= it is part of a rule: 'ema:0.999,update_after=9,buffers=copy'"
            )
        return None
    if len(starts) > 1:
        raise SettingsError("give update_starting_at_step or update_starting_at_epoch, not both")
    made = Decay(decay, every, after_step or 0, after_epoch, "average" if use_buffers else "copy")
    made.rules(1)
    return made


def rules_of(arguments: Mapping[str, Any]) -> tuple[AverageSpec, ...]:
    """The averages among these arguments of `EmaClient`, by default its own. All are validated, before it is made.

    Raises:
        SettingsError: one of them cannot be used.
        TypeError: there is no such argument.
    """
    for name in arguments:
        if name not in _CLIENT:
            raise TypeError(f"EmaCallback() got an unexpected keyword argument {name!r}")
    given = {name: parameter.default for name, parameter in _CLIENT.items()} | dict(arguments)
    if given["steps_per_epoch"] is None:
        given["steps_per_epoch"] = 1.0  # not known yet
    return Settings.of(os.environ, given).averages
