"""The averaging rules as values: `Ema(0.9999)` is `ema:0.9999`, its default name `ema-0.9999`.

The arithmetic is the server's; a value holds what both ends, the files and the URLs agree on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal, TypeAlias, cast

from ema_proto.averages.parameters import BUFFERS, Buffers, Count, Number, Treatment, Word, of_kind
from ema_proto.averages.profiles import GAMMA_MAX, SIGMA_REL_MAX, SIGMA_REL_MIN, gamma_of, sigma_rel_of
from ema_proto.errors import SHOWN_CHARS, LocalProtocolError
from ema_proto.limits import PATTERNS_MAX, QUANTITY_MAX, QUANTITY_MIN, WINDOW_MAX
from ema_proto.names import check_name, unmatched

_EXAMPLE = "for example ema:0.9999,warmup=timm"
_SHARE = "in [0, 1)"  # golden vectors contain this text
_LENGTHS = ("decay", "half_life", "half_life_samples", "half_life_epochs")
_WARMUPS = ("timm", "tf", "exponential", "half_life", "debias")
_BELONGS = {"gamma": "timm", "power": "timm", "min_decay": "timm", "tau": "exponential", "fraction": "half_life"}
_COPYING = ("timm", "debias")


def _quantity(example: str, *, infinite: bool = False) -> Number:
    return Number(
        "a number of at least 1e-9 and below 1e15",
        f"for example {example}",
        low=QUANTITY_MIN,
        high=QUANTITY_MAX,
        infinite=infinite,
    )


_NAMES_SHOWN = 5
_SIGMA_REL = Number(
    f"at least {SIGMA_REL_MIN:f} and below {SIGMA_REL_MAX:.6f} (1/sqrt(12))",
    "for example power:sigma_rel=0.05",
    low=SIGMA_REL_MIN,
    high=SIGMA_REL_MAX,
)
_GAMMA = Number(f"at least 0 and below {GAMMA_MAX:.0f}", "for example power:gamma=6.94", high=GAMMA_MAX)
_POWER = Number("at least 0 and below 1e15", "for example bema:ema_power=0.5", high=QUANTITY_MAX)
_LAG = Number("at least 1 and below 1e15", "for example bema:lag=10", low=1.0, high=QUANTITY_MAX)
_EVERY = Count("for example every=100", low=1)


@dataclass(frozen=True, slots=True)
class Ema(Treatment):
    """Exponential moving average: `average = d * average + (1 - d) * weights`, once for each step.

    The length of its memory is given in one of four ways: `decay`, or a half-life, after which half of the old average
    is left: `d = 0.5 ** (1 / half_life)`. In samples or epochs it means the same at any batch size; then the trainer
    has to give `samples_per_step=` or `steps_per_epoch=`.

    At the t-th step of the average's time let `n = t - update_after`. Up to `n = 0` the average is a copy of the
    weights, with `init="first"` up to `n = 1`. From then on `d` is that of `warmup`. Over a
    gap the decays of all its steps are multiplied.

    - `"timm"`: `max(min(1 - (1 + (n - 1) / gamma) ** -power, decay), min_decay)`, of timm's ModelEmaV3, diffusers and
      ema-pytorch.
    - `"tf"`: `min((1 + n) / (10 + n), decay)`, of TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    - `"exponential"`: `decay * (1 - exp(-n / tau))`, of YOLOv5 and Ultralytics.
    - `"half_life"`: the half-life is at most `fraction * n`. EDM's ramp-up; with `half_life=inf` torchtitan's
      `half_life_fraction`, a power-function average.
    - `"debias"`: `decay * (1 - decay ** (n - 1)) / (1 - decay ** n)`, which is an average that began at zero and is
      divided by `1 - decay ** n`, as Adam's, optax's and TensorFlow's `zero_debias` are.

    `Treatment` describes the parameters that all averaging rules have.

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

    Raises:
        LocalProtocolError: a parameter is out of range, does not go with another, or the name is not allowed.
    """

    KEYWORD: ClassVar[str] = "ema"
    LEADING: ClassVar[str] = "decay"

    decay: float | None = field(default=None, metadata=of_kind(Number(_SHARE, "for example 0.9999", high=1.0)))
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
    min_decay: float = field(default=0.0, metadata=of_kind(Number(_SHARE, "for example min=0.5", high=1.0), "min"))
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


@dataclass(frozen=True, slots=True)
class PowerEma(Treatment):
    """Power-function average of Karras et al. (arXiv 2312.02696): weights in proportion to `t ** gamma`, t the step.

    Its memory grows with the run, so it needs no warm-up and forgets the beginning.

    `Treatment` describes the parameters that all averaging rules have.

    Args:
        sigma_rel: standard deviation of its weights relative to the run so far, in [1e-6, 1/sqrt(12)); 0.05 and 0.10
            are usual. This or `gamma`.
        name: name of the average; the default is `power-{sigma_rel}` or `power-gamma-{gamma}`.
        gamma: the exponent, in [0, 1e6); 0 is the plain mean.

    Raises:
        LocalProtocolError: a parameter is out of range, both or none are given, or the name is not allowed.
    """

    KEYWORD: ClassVar[str] = "power"
    LEADING: ClassVar[str] = ""

    sigma_rel: float | None = field(default=None, metadata=of_kind(_SIGMA_REL))
    name: str = ""
    _: KW_ONLY
    gamma: float | None = field(default=None, metadata=of_kind(_GAMMA))

    def check_together(self) -> None:
        """Refuse both lengths, or none."""
        if (self.sigma_rel is None) == (self.gamma is None):
            raise LocalProtocolError(
                "a power average has one of sigma_rel and gamma: use for example power:sigma_rel=0.05"
            )

    @property
    def exponent(self) -> float:
        """`gamma`, or that of `sigma_rel`."""
        return gamma_of(self.sigma_rel) if self.sigma_rel is not None else cast(float, self.gamma)

    @property
    def width(self) -> float:
        """`sigma_rel`, or that of `gamma`."""
        return self.sigma_rel if self.sigma_rel is not None else sigma_rel_of(self.exponent)


@dataclass(frozen=True, slots=True)
class Uniform(Treatment):
    """Plain mean of the weights (SWA) over all steps or some. Before the first of these it follows the weights.

    `Treatment` describes the parameters that all averaging rules have.

    Args:
        start: the first step whose weights may count.
        every: only steps divisible by it count.
        name: name of the average; the default is `swa`, or made of the parameters, `swa-start-1000`.

    Raises:
        LocalProtocolError: a parameter is out of range or the name is not allowed.
    """

    KEYWORD: ClassVar[str] = "swa"
    LEADING: ClassVar[str] = ""

    start: int = field(default=0, metadata=of_kind(Count("for example start=1000")))
    every: int = field(default=1, metadata=of_kind(_EVERY))
    name: str = ""


@dataclass(frozen=True, slots=True)
class Window(Treatment):
    """Plain mean of the weights of the last `k` steps that are divisible by `every` (LAWA). It stores `k` snapshots.

    Before the first such step it follows the weights, and before the k-th it is the mean of those so far.

    `Treatment` describes the parameters that all averaging rules have.

    Args:
        k: how many snapshots, 1 to 256.
        every: only steps divisible by it count.
        name: name of the average; the default is made of the parameters, `window-5`.

    Raises:
        LocalProtocolError: a parameter is out of range or the name is not allowed.
    """

    KEYWORD: ClassVar[str] = "window"
    LEADING: ClassVar[str] = "k"

    k: int = field(metadata=of_kind(Count("for example window:5", low=1, high=WINDOW_MAX, unit="snapshots")))
    every: int = field(default=1, metadata=of_kind(_EVERY))
    name: str = ""


@dataclass(frozen=True, slots=True)
class Wsd(Treatment):
    """Imitates, on a run with a constant learning rate, one that decays over `steps` steps after `start`.

    The weights of these steps are averaged with the falls of the learning rate as their shares: as if each step's
    update had been scaled by the rate's factor (warmup-stable-merge, arXiv 2507.17634). Before `start` the average
    follows the weights, and after `start + steps` it does not change.

    `Treatment` describes the parameters that all averaging rules have.

    Args:
        start: the decay begins after this step.
        steps: length of the decay, 1 or more.
        shape: factor of the rate after a fraction x of them: `"linear"` 1 - x, `"sqrt"` 1 - sqrt(x), `"cosine"`
            (1 + cos(pi x)) / 2.
        name: name of the average; the default is made of the parameters, `wsd-start-10000-steps-2000`.

    Raises:
        LocalProtocolError: a parameter is out of range or the name is not allowed.
    """

    KEYWORD: ClassVar[str] = "wsd"
    LEADING: ClassVar[str] = ""

    start: int = field(metadata=of_kind(Count("for example wsd:start=10000,steps=2000")))
    steps: int = field(metadata=of_kind(Count("for example wsd:start=10000,steps=2000", low=1)))
    shape: Literal["linear", "sqrt", "cosine"] = field(
        default="linear", metadata=of_kind(Word(("linear", "sqrt", "cosine")))
    )
    name: str = ""


@dataclass(frozen=True, slots=True)
class Bema(Treatment):
    """Bias-corrected moving average (BEMA, arXiv 2508.00180), as TRL's `BEMACallback` computes it.

    Let t be a step of the average's time. Before and at t = `update_after` the average follows the weights; its initial
    weights are those of that step, for `update_after=0` those of before the first step. Every `every` steps from there
    on `ema = (1 - b) * ema + b * weights`, and `average = ema + a * (weights - initial)`, with
    `b = max((lag + multiplier * t) ** -ema_power, min)` and `a = (lag + multiplier * t) ** -bias_power`. The correction
    makes up for the lag of the moving average. Over a gap the factors `1 - b` of all its updates are multiplied.

    It takes the memory of three averages. `Treatment` describes the parameters that all averaging rules have; float
    buffers are copied by default, since a corrected variance can be negative.

    Args:
        every: steps from one update to the next, from `update_after` on; TRL's `update_freq`.
        ema_power: in [0, 1e15).
        bias_power: in [0, 1e15).
        lag: in [1, 1e15).
        multiplier: in [1e-9, 1e15).
        min_weight: lowest share b of the newest weights, in [0, 1); TRL's `min_ema_multiplier`.
        update_after: the average is a copy of the weights for so many steps.
        name: name of the average; the default is `bema`, or made of the parameters.

    Raises:
        LocalProtocolError: a parameter is out of range or the name is not allowed.
    """

    KEYWORD: ClassVar[str] = "bema"
    LEADING: ClassVar[str] = ""

    every: int = field(default=400, metadata=of_kind(_EVERY))
    ema_power: float = field(default=0.5, metadata=of_kind(_POWER))
    bias_power: float = field(default=0.2, metadata=of_kind(_POWER))
    lag: float = field(default=10.0, metadata=of_kind(_LAG))
    multiplier: float = field(default=1.0, metadata=of_kind(_quantity("multiplier=1")))
    min_weight: float = field(default=0.0, metadata=of_kind(Number(_SHARE, "for example min=0.01", high=1.0), "min"))
    update_after: int = field(default=0, metadata=of_kind(Count("for example update_after=100")))
    name: str = ""
    _: KW_ONLY
    buffers: Buffers = field(default="copy", metadata=BUFFERS)


@dataclass(frozen=True, slots=True)
class Raw:
    """The last weights as they were sent, to be evaluated beside the averages."""

    KEYWORD: ClassVar[str] = "raw"
    LEADING: ClassVar[str] = ""

    name: str = "raw"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", check_name("average", self.name or "raw"))

    @property
    def spec(self) -> str:
        """The rule as a string, without the name."""
        return "raw"


AverageSpec: TypeAlias = Ema | PowerEma | Uniform | Window | Wsd | Bema | Raw


def begins_before_first_step(rule: AverageSpec) -> bool:
    """Whether the average begins with the weights of before the first step, which the trainer sends as a `set`."""
    if isinstance(rule, Bema):
        return rule.update_after == 0
    return isinstance(rule, Ema) and rule.init == "start"


def check_matches(rules: Iterable[AverageSpec], names: Sequence[str], others: Iterable[AverageSpec] = ()) -> None:
    """Refuse rules with a pattern that matches none of the tensors' `names`, and too many patterns.

    The patterns of `others`, which the run has already, count too.

    Raises:
        LocalProtocolError: there are too many patterns, or the text names one and some of the names.
    """
    averaging = [rule for rule in rules if not isinstance(rule, Raw)]
    counted = [*averaging, *(rule for rule in others if not isinstance(rule, Raw))]
    count = sum(len(rule.include) + len(rule.exclude) for rule in counted)
    if count > PATTERNS_MAX:
        raise LocalProtocolError(
            f"the run's averages have {count} patterns: use {PATTERNS_MAX} at most, a * stands for many names"
        )
    for rule in averaging:
        for what, patterns in (("include", rule.include), ("exclude", rule.exclude)):
            for pattern in unmatched(patterns, names):
                raise LocalProtocolError(
                    f"the pattern {pattern[:SHOWN_CHARS]!r} of {what}= of average {rule.name!r} matches no tensor: use "
                    f"names like {', '.join(name[:SHOWN_CHARS] for name in names[:_NAMES_SHOWN])}"
                )
