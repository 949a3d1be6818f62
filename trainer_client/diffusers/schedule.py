"""The decay of diffusers' `EMAModel`: its parameters, as a checkpoint holds them, and the rule that they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ema_proto.averages.rules import Ema
from ema_proto.errors import LocalProtocolError
from trainer_client.errors import SettingsError

_COUNTED = "optimization_step"


@dataclass(frozen=True, slots=True)
class Schedule:
    """The parameters of `EMAModel` that its decay depends on, with its defaults.

    Args:
        decay: the highest decay.
        min_decay: the lowest, where a decay applies.
        update_after_step: the average is a copy of the weights for so many steps and one more.
        use_ema_warmup: the decay rises as `1 - (1 + n / inv_gamma) ** -power`, not as `(1 + n) / (10 + n)`.
        inv_gamma: of that warm-up.
        power: of that warm-up.
    """

    decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    use_ema_warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def decay_at(self, step: int) -> float:
        """The decay of the step with this number, from 1; as of `EMAModel.get_decay`."""
        n = max(0, step - self.update_after_step - 1)
        if n <= 0:
            return 0.0
        rising = 1 - (1 + n / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + n) / (10 + n)
        return max(min(rising, self.decay), self.min_decay)

    def rule(self, name: str) -> Ema:
        """The averaging rule with these decays.

        Raises:
            SettingsError: there is none, or a parameter is out of range.
        """
        after = self.update_after_step
        if after < 0:
            raise SettingsError(f"update_after_step={after} is below 0")
        try:
            if self.min_decay >= self.decay:  # constant
                return Ema(self.min_decay, name, update_after=after, buffers="copy")
            if self.use_ema_warmup:
                return Ema(
                    self.decay,
                    name,
                    warmup="timm",
                    gamma=self.inv_gamma,
                    power=self.power,
                    min_decay=self.min_decay,
                    update_after=after,
                    buffers="copy",
                )
            if self.min_decay > 0:
                raise SettingsError(
                    f"min_decay={self.min_decay} needs use_ema_warmup=True, or min_decay=decay for a constant decay"
                )
            return Ema(self.decay, name, warmup="tf", update_after=after + 1, init="start", buffers="copy")
        except LocalProtocolError as error:
            raise SettingsError(str(error)) from None

    def state(self, step: int) -> dict[str, Any]:
        """These parameters and the number of steps taken, by the names that `EMAModel` uses in a checkpoint."""
        return dataclasses.asdict(self) | {_COUNTED: step}

    def loaded(self, state: Mapping[str, Any], step: int) -> tuple[Self, int]:
        """The schedule and the number of steps of a checkpoint; what it lacks is as here, or `step`.

        Raises:
            SettingsError: a value is not of its kind.
        """
        given = {each.name: state.get(each.name, getattr(self, each.name)) for each in dataclasses.fields(self)}
        kinds = {"update_after_step": int, "use_ema_warmup": bool}
        given_step = state.get(_COUNTED, step)
        for name, value in (*given.items(), (_COUNTED, given_step)):
            kind = int if name == _COUNTED else kinds.get(name, (int, float))
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise SettingsError(f"{name}={value!r} in the state is not what EMAModel.state_dict() returns")
        return type(self)(**given), given_step


STATE_KEYS = (*(each.name for each in dataclasses.fields(Schedule)), _COUNTED)
