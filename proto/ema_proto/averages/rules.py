"""The other rules as values, and the type of them all: power function, plain means, an imitated decay, the raw weights.

The arithmetic lives in the server; here is only what both ends, the files and the URLs must agree on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal, TypeAlias, cast

from ema_proto.averages.exponential import Ema
from ema_proto.averages.parameters import (
    SHOWN_CHARS,
    Count,
    Number,
    Treatment,
    Word,
    of_kind,
)
from ema_proto.averages.profiles import GAMMA_MAX, SIGMA_REL_MAX, SIGMA_REL_MIN, gamma_of, sigma_rel_of
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import PATTERNS_MAX, WINDOW_MAX
from ema_proto.names import check_name
from ema_proto.patterns import unmatched

_NAMES_SHOWN = 5
_SIGMA_REL = Number(
    f"in [{SIGMA_REL_MIN:f}, 1/sqrt(12))",
    "for example power:sigma_rel=0.05",
    low=SIGMA_REL_MIN,
    high=SIGMA_REL_MAX,
    closed_low=True,
)
_GAMMA = Number(f"in [0, {GAMMA_MAX:.0f})", "for example power:gamma=6.94", high=GAMMA_MAX, closed_low=True)
_EVERY = Count("for example every=100", low=1)


@dataclass(frozen=True, slots=True)
class PowerEma(Treatment):
    """Power-function average of Karras et al. (arXiv 2312.02696): weights in proportion to `t ** gamma`, t the step.

    Its memory grows with the run: it needs no warm-up, and forgets the beginning.

    Args:
        sigma_rel: standard deviation of its weights relative to the run so far, in [1e-6, 1/sqrt(12)); 0.05 and 0.10
            are usual. This or `gamma`.
        name: name of the average; the default is `power-{sigma_rel}` or `power-gamma-{gamma}`.
        gamma: the exponent, in [0, 1e6); 0 is the plain mean.
        buffers: as of `Treatment`.
        include: as of `Treatment`.
        exclude: as of `Treatment`.
        accumulator: as of `Treatment`.

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
    """Plain mean of the weights (SWA), of all steps or of some. Before the first of them it follows the weights.

    Args:
        start: the first step whose weights may count.
        every: those of steps divisible by it count.
        name: name of the average; the default is `swa`, or made of the parameters, `swa-start-1000`.
        buffers: as of `Treatment`.
        include: as of `Treatment`.
        exclude: as of `Treatment`.
        accumulator: as of `Treatment`.

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
    """Plain mean of the weights of the last `k` steps that are divisible by `every` (LAWA). It holds `k` snapshots.

    Before the first such step it follows the weights, and before the k-th it is the mean of those there are.

    Args:
        k: how many snapshots, 1 to 256.
        every: those of steps divisible by it count.
        name: name of the average; the default is made of the parameters, `window-5`.
        buffers: as of `Treatment`.
        include: as of `Treatment`.
        exclude: as of `Treatment`.
        accumulator: as of `Treatment`.

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
    """What a learning rate that decays over `steps` steps after `start` would give, on a run whose rate is constant.

    The weights of these steps are averaged with the falls of the learning rate as their shares: as if each step's
    update had been scaled by the rate's factor (warmup-stable-merge, arXiv 2507.17634). Before `start` the average
    follows the weights, and after `start + steps` it stands still.

    Args:
        start: the decay begins after this step.
        steps: it takes so many, 1 or more.
        shape: factor of the rate after the share x of them: `"linear"` 1 - x, `"sqrt"` 1 - sqrt(x), `"cosine"`
            (1 + cos(pi x)) / 2.
        name: name of the average; the default is made of the parameters, `wsd-start-10000-steps-2000`.
        buffers: as of `Treatment`.
        include: as of `Treatment`.
        exclude: as of `Treatment`.
        accumulator: as of `Treatment`.

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
class Raw:
    """The last weights as they were sent, to be evaluated beside the averages."""

    KEYWORD: ClassVar[str] = "raw"
    LEADING: ClassVar[str] = ""

    name: str = "raw"

    def __post_init__(self) -> None:
        """Validate the name."""
        object.__setattr__(self, "name", check_name("average", self.name or "raw"))

    @property
    def spec(self) -> str:
        """The rule as a string, without the name."""
        return "raw"


AverageSpec: TypeAlias = Ema | PowerEma | Uniform | Window | Wsd | Raw


def check_matches(rules: Iterable[AverageSpec], names: Sequence[str], others: Iterable[AverageSpec] = ()) -> None:
    """Refuse rules with a pattern that means no tensor: it was meant to mean some.

    Args:
        rules: the rules.
        names: canonical names of a run's tensors.
        others: rules that the run has already; their patterns count too.

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
