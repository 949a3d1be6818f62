"""The exponential moving average as a value: `Ema(0.9999)` is `ema:0.9999`, its default name `ema-0.9999`.

The arithmetic lives in the server; here is only what both ends, the files and the URLs must agree on.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal

from ema_proto.averages.parameters import Count, Number, Treatment, Word, of_kind
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import QUANTITY_MAX, QUANTITY_MIN

_EXAMPLE = "for example ema:0.9999,warmup=timm"
_SHARE = "in [0, 1)"
_LENGTHS = ("decay", "half_life", "half_life_samples", "half_life_epochs")
_WARMUPS = ("timm", "tf", "exponential", "half_life", "debias")
_BELONGS = {"gamma": "timm", "power": "timm", "min_decay": "timm", "tau": "exponential", "fraction": "half_life"}
_COPYING = ("timm", "debias")


def _quantity(example: str, *, infinite: bool = False) -> Number:
    return Number(
        "a number in [1e-9, 1e15)",
        f"for example {example}",
        low=QUANTITY_MIN,
        high=QUANTITY_MAX,
        closed_low=True,
        infinite=infinite,
    )


@dataclass(frozen=True, slots=True)
class Ema(Treatment):
    """Exponential moving average: `average = d * average + (1 - d) * weights`, once for each step.

    The length of its memory is given in one of four ways: `decay`, or a half-life, after which half of the old average
    is left: `d = 0.5 ** (1 / half_life)`. In samples or epochs it means the same at any batch size; then the trainer
    has to tell `samples_per_step=` or `steps_per_epoch=`.

    At the t-th step of the average's time let `n = t - update_after`. Up to `n = 0` the average is a copy of the
    weights, with `init="first"` up to `n = 1`. From then on `d` is that of `warmup`, which needs no rule of its own for
    gaps: the product of the decays of all steps counts.

    - `"timm"`: `max(min(1 - (1 + (n - 1) / gamma) ** -power, decay), min_decay)`, of timm's ModelEmaV3, diffusers and
      ema-pytorch.
    - `"tf"`: `min((1 + n) / (10 + n), decay)`, of TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    - `"exponential"`: `decay * (1 - exp(-n / tau))`, of YOLOv5 and Ultralytics.
    - `"half_life"`: the half-life is at most `fraction * n`. EDM's ramp-up; with `half_life=inf` torchtitan's
      `half_life_fraction`, a power-function average.
    - `"debias"`: `decay * (1 - decay ** (n - 1)) / (1 - decay ** n)`, which is an average that began at zero and is
      divided by `1 - decay ** n`, as Adam's, optax's and TensorFlow's `zero_debias` are.

    Args:
        decay: share of the old average kept at each step, in [0, 1).
        name: name of the average; the default is made of the parameters, `ema-{decay}`.
        half_life: in steps, in [1e-9, 1e15) like all lengths; infinity with `warmup="half_life"`.
        half_life_samples: in samples.
        half_life_epochs: in epochs.
        warmup: one of the above, or None for a constant decay.
        gamma: of `"timm"`, in [1e-9, 1e15): how many steps it stretches over.
        power: of `"timm"`, in [1e-9, 1e15): 1 is a plain mean, 2/3 suits a million steps, 3/4 fewer.
        min_decay: of `"timm"`, in [0, 1): the decay is never below it.
        tau: of `"exponential"`, in steps, in [1e-9, 1e15).
        fraction: of `"half_life"`, in [1e-9, 1e15).
        update_after: the average is a copy of the weights for so many steps.
        init: `"first"`: the first update copies the weights. `"start"`: the average begins with the weights of before
            the first step, as a copy of the model made before training does.
        buffers: as of `Treatment`.
        include: as of `Treatment`.
        exclude: as of `Treatment`.
        accumulator: as of `Treatment`.

    Raises:
        LocalProtocolError: a parameter is out of range, does not go with another, or the name is not allowed.
    """

    KEYWORD: ClassVar[str] = "ema"
    LEADING: ClassVar[str] = "decay"

    decay: float | None = field(
        default=None, metadata=of_kind(Number(_SHARE, "for example 0.9999", high=1.0, closed_low=True))
    )
    name: str = ""
    _: KW_ONLY
    half_life: float | None = field(default=None, metadata=of_kind(_quantity("half_life=5000", infinite=True)))
    half_life_samples: float | None = field(default=None, metadata=of_kind(_quantity("half_life_samples=500000")))
    half_life_epochs: float | None = field(default=None, metadata=of_kind(_quantity("half_life_epochs=2")))
    warmup: Literal["timm", "tf", "exponential", "half_life", "debias"] | None = field(
        default=None, metadata=of_kind(Word(_WARMUPS))
    )
    gamma: float = field(default=1.0, metadata=of_kind(_quantity("gamma=1")))
    power: float = field(default=2 / 3, metadata=of_kind(_quantity("power=0.75")))
    min_decay: float = field(
        default=0.0, metadata=of_kind(Number(_SHARE, "for example min=0.5", high=1.0, closed_low=True), "min")
    )
    tau: float = field(default=2000.0, metadata=of_kind(_quantity("tau=2000")))
    fraction: float = field(default=0.05, metadata=of_kind(_quantity("fraction=0.05")))
    update_after: int = field(default=0, metadata=of_kind(Count("for example update_after=100")))
    init: Literal["first", "start"] = field(default="first", metadata=of_kind(Word(("first", "start"))))

    def check_together(self) -> None:
        """Refuse several lengths or none, and what belongs to another warm-up."""
        lengths = [name for name in _LENGTHS if getattr(self, name) is not None]
        if len(lengths) != 1:
            given = f"was given {' and '.join(lengths)}" if lengths else "has no length"
            raise LocalProtocolError(
                f"an ema {given}: use one of ema:0.9999, ema:half_life=5000, half_life_samples= or half_life_epochs="
            )
        if self.half_life == math.inf and self.warmup != "half_life":
            raise LocalProtocolError("ema half_life inf never ends: use it with warmup=half_life, or for example 5000")
        for name, warmup in _BELONGS.items():
            if self.warmup != warmup and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                key = "min" if name == "min_decay" else name
                raise LocalProtocolError(f"ema {key} belongs to a warm-up: add warmup={warmup}, {_EXAMPLE}")
        if self.init == "start" and self.warmup in _COPYING:
            raise LocalProtocolError(
                f"ema warmup={self.warmup} copies the weights at its first step, which leaves nothing of those of "
                "before it: leave init=start out"
            )
