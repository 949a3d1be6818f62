"""Decides what a JOIN leads to, from what the trainer asks and what is known of the run. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ema_proto.errors import RejectCode
from ema_proto.wire import messages
from ema_proto.wire.manifest import Manifest
from ema_server.averager.jobs import Refused

_STEPS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Known:
    """A run that has had a snapshot.

    `averages` maps names to specs, `removed` has name and spec of those removed; `held_steps` are the steps of its
    generations.
    """

    last_step: int
    manifest: Manifest
    averages: Mapping[str, str]
    held_steps: tuple[int, ...]
    removed: frozenset[tuple[str, str]] = frozenset()


class Decision(Enum):
    START = "begin a new run"
    CONTINUE = "continue from the last step"
    SET_ASIDE = "keep the old run under a dated name and begin a new one"


@dataclass(frozen=True, slots=True)
class GoBack:
    """Rewind to the newest generation at or before `step`, then continue."""

    step: int


def decide(join: messages.Join, known: Known | None) -> Decision | GoBack | Refused:
    """What to do about `join`; `known` is None for a run without a snapshot."""
    if known is None:
        if join.resume == "must" and not join.reconnect:
            text = f"run {join.run!r} has nothing to continue: check its name, or join with resume='auto'"
            return Refused(RejectCode.NOTHING_TO_CONTINUE, text)
        return Decision.START
    if join.resume == "never" and not join.reconnect:
        return Decision.SET_ASIDE
    refused = _changed(join, known)
    if refused is not None:
        return refused
    if join.reconnect or join.first_step > known.last_step:
        return Decision.CONTINUE
    if any(step < join.first_step for step in known.held_steps):
        return GoBack(join.first_step - 1)
    return _no_generation(join, known)


def _changed(join: messages.Join, known: Known) -> Refused | None:
    difference = known.manifest.first_difference(join.manifest, any_order=True)
    ways_out = "use another run name, or resume='never' to set the old run aside"
    if difference is not None:
        text = f"run {join.run!r} was started with another model: {difference}; {ways_out}"
        return Refused(RejectCode.MANIFEST_CHANGED, text)
    for average in join.averages:
        if (average.name, average.spec) in known.removed:
            continue
        spec = known.averages.get(average.name)
        if spec is None:
            names = ", ".join(known.averages)
            text = (
                f"run {join.run!r} has no average {average.name!r}, it has {names}: join with these, and add others "
                f"while it streams (ema averages {join.run} --add {shlex.quote(average.spec)} --name {average.name})"
            )
            return Refused(RejectCode.AVERAGE_CHANGED, f"{text}, {ways_out}")
        if spec != average.spec:
            text = f"average {average.name!r} of run {join.run!r} is {spec}, not {average.spec}: join with {spec}"
            return Refused(RejectCode.AVERAGE_CHANGED, f"{text}, {ways_out}")
    return None


def _no_generation(join: messages.Join, known: Known) -> Refused:
    steps = sorted(set(known.held_steps))
    shown = ", ".join(map(str, steps[:_STEPS_SHOWN])) + (", ..." if len(steps) > _STEPS_SHOWN else "")
    held = f"its generations are at steps {shown}" if steps else "it has no generation yet"
    text = (
        f"run {join.run!r} is at step {known.last_step} and cannot go back before step {join.first_step}: {held}. "
        "If the trainer continues from a later step, give it (step=, load_state_dict()); else set the old run aside "
        "(resume='never') or use another run name. With ema.checkpoint(step) at each of the trainer's own checkpoints "
        "there is always a generation to go back to"
    )
    return Refused(RejectCode.NO_GENERATION, text)
