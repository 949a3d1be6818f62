"""Plot the weight of each step in an average, for the rules of docs/guides/averages.md.

    pip install --group plots && python scripts/plot_profiles.py docs/guides/profiles.svg

The weights are those of the server, from its own pure functions. The file is byte-identical with the same
release of matplotlib.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ema_proto.averages.rules import AverageSpec, Window
from ema_proto.averages.specs import parse_average
from ema_server.rules.weights import Span, points, weight_of
from ema_server.rules.window import Entries, entered

STEPS = 10_000
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # distinguishable for colour-blind readers
_SHOWN_SHARE = 0.01  # of the initial weights

Weights = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its title, its rules, and the number of parts into which the run is divided."""

    title: str
    rules: tuple[str, ...]
    parts: int = 125


PANELS = (
    Panel(
        "Constant decay, from the weights of before the run",
        ("ema:0.999,init=start", "ema:0.9998,init=start", "ema:0.9999,init=start"),
    ),
    Panel(
        "Decay 0.9999 with a warm-up",
        (
            "ema:0.9999,warmup=timm",
            "ema:0.9999,warmup=tf",
            "ema:0.9999,warmup=half_life",
            "ema:0.9999,warmup=debias",
        ),
    ),
    Panel("Weights that grow with the run", ("power:sigma_rel=0.05", "power:sigma_rel=0.1", "swa")),
    Panel(
        "The end of the run only",
        ("window:5,every=400", "swa:start=8000", "wsd:start=8000,steps=2000,shape=sqrt"),
        50,
    ),
)


def profile(rule: AverageSpec, steps: int) -> Weights:
    """The weights in the average after `steps` steps, each of them sent: of before the run at 0, of step t at t.

    Args:
        rule: any rule.
        steps: how many.
    """
    if isinstance(rule, Window):
        return _window(rule, steps)
    taken = [weight_of(rule, Span(step - 1, step, 0)) for step in range(1, steps + 1)]
    new = np.array([1.0, *(1.0 if weight is None else weight for weight in taken)])
    left = np.append(np.cumprod((1.0 - new[1:])[::-1])[::-1], 1.0)
    weights: Weights = new * left
    return weights


def draw(file: Path) -> None:
    """Draw all panels into an SVG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        axis.set_title(panel.title, fontsize=11, loc="left")
        for colour, rule in zip(_COLOURS, panel.rules, strict=False):
            _curve(axis, rule, panel.parts, colour)
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"the run, from its first step to the last of {STEPS:,}", fontsize=10)
    figure.supylabel("weight of a step (1: that of the plain mean)", fontsize=10)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a reproducible SVG, without date or random ids."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "ema-sidecar", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def _curve(axis: Any, text: str, parts: int, colour: str) -> None:
    weights = profile(parse_average(text), STEPS)
    label = text.removesuffix(",init=start")
    if weights[0] >= _SHOWN_SHARE:
        label += f" ({weights[0]:.0%} from before)"
    density = weights[1:].reshape(parts, -1).sum(axis=1) * parts
    axis.stairs(density, np.linspace(0, 1, parts + 1), color=colour, linewidth=1.6, label=label, baseline=None)


def _window(rule: Window, steps: int) -> Weights:
    entries: Entries = ()
    for step in range(1, steps + 1):
        entries = entered(entries, rule.k, step, points(rule.every, step - 1, step))
    weights = np.zeros(steps + 1)
    total = sum(entry.count for entry in entries)
    for entry in entries:
        weights[entry.step] = entry.count / total
    return weights


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
