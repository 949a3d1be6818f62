"""Random sequences of jobs against a model of what each must answer, and of the ledgers that result."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import UNKNOWN, StepUnits
from ema_proto.wire.messages import Mode
from ema_server.averager.jobs import Applied, Changed, Failed, Joined, Quarantined, Refused, Rewound, Unchanged
from support.examples import examples
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.server_core import ServerCore, durable, joined, manifest_of, versions_by_average

pytestmark = pytest.mark.slow

_FIRST = ("raw", "ema:0.9")
_OTHERS = ("ema:0.5", "swa", "window:2", "power:sigma_rel=0.1", "ema:half_life_samples=64,name=samples")
_DECAYS = {"ema-0.9": 0.9, "ema-0.5": 0.5}
_UNITS = StepUnits(samples_per_step=32)


def _weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.sin(torch.arange(6.0) * step), "n": torch.tensor(step)}


def _nonfinite(step: int) -> dict[str, Tensor]:
    return {**_weights(step), "w": torch.full((6,), math.nan)}


_MANIFEST = manifest_of(_weights(1))


@dataclass(frozen=True)
class _Average:
    """What one average has had: its origin, its steps, and those of them that replaced it."""

    spec: str
    origin: int
    steps: tuple[int, ...] = ()
    replaced: tuple[int, ...] = ()

    def after(self, step: int, mode: Mode) -> _Average:
        replaces = mode == "set" or not self.steps
        steps = self.steps if self.steps[-1:] == (step,) else (*self.steps, step)
        replaced = (*self.replaced, step) if replaces and self.replaced[-1:] != (step,) else self.replaced
        return replace(self, steps=steps, replaced=replaced)


@dataclass(frozen=True)
class _State:
    """A run: in memory, or in one of its generations."""

    origin: int
    last_step: int | None = None
    averages: dict[str, _Average] = field(default_factory=dict)


def _new_state(origin: int) -> _State:
    return _State(origin, None, {parse_average(spec).name: _Average(spec, origin) for spec in _FIRST})


class Sequences(RuleBasedStateMachine):
    """One run of one server. `generations` are in the order in which they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.core = self._started()
        self.generations: list[_State] = []
        self.state = _new_state(0)
        self.gave_units = False

    @initialize(origin=st.sampled_from([0, 4]), gives_units=st.booleans())
    def begin(self, origin: int, gives_units: bool) -> None:
        """Join a new run."""
        self.state = _new_state(origin)
        self.gave_units = gives_units
        joined(self._join(origin + 1, gives_units=gives_units))

    @rule(checked=st.booleans())
    def check_first(self, checked: bool) -> None:
        """From now on, snapshots are checked before they are submitted, or by the averager."""
        self.core.checks_first = checked

    @rule(offset=st.integers(-3, 4), mode=st.sampled_from(["update", "update", "update", "set"]))
    def apply(self, offset: int, mode: Mode) -> None:
        """Apply a snapshot around the last step, or around the origin."""
        last = self.state.last_step
        step = max(0, (self.state.origin if last is None else last) + offset)
        answer = self.core.apply("r", step, _weights(step), mode)
        if last is None:
            counts = step > self.state.origin or (mode == "set" and step == self.state.origin)
        else:
            counts = step > last or (mode == "set" and step == last)
        if counts:
            averages = {name: average.after(step, mode) for name, average in self.state.averages.items()}
            self.state = replace(self.state, last_step=step, averages=averages)
        is_repeated = mode == "update" and last is not None
        assert isinstance(answer, Applied if counts or is_repeated else Quarantined), answer

    @rule(offset=st.integers(1, 3))
    def apply_nonfinite(self, offset: int) -> None:
        """A snapshot with NaN changes nothing."""
        step = (self.state.last_step or self.state.origin) + offset
        assert isinstance(self.core.apply("r", step, _nonfinite(step)), Quarantined)

    @rule(pinned=st.booleans())
    def publish(self, pinned: bool) -> None:
        """Make it durable."""
        assert durable(self.core.publish("r", "checkpoint" if pinned else "request")).step == self.state.last_step
        self._published()

    @rule(back=st.integers(-1, 8))
    def rewind(self, back: int) -> None:
        """Go back, to where it is, or to where there is nothing."""
        last = self.state.last_step
        step = max(0, (last or 0) - back)
        answer = self.core.rewind("r", step)
        if last is not None and step >= last:
            self._published()
            assert isinstance(answer, Rewound)
            assert answer.step == last
        elif last is None or not self._goes_back(step):
            assert isinstance(answer, Failed), answer
        else:
            assert isinstance(answer, Rewound), answer
            assert answer.step == self.state.last_step

    @rule(spec=st.sampled_from(_OTHERS))
    def add(self, spec: str) -> None:
        """Add an average."""
        name, last = parse_average(spec).name, self.state.last_step
        answer = self.core.add("r", spec)
        if last is None or name in self.state.averages:
            assert isinstance(answer, Unchanged), answer
        elif name == "samples" and not self.gave_units:
            assert isinstance(answer, Changed) or "samples_per_step" in answer.text
        else:
            assert isinstance(answer, Changed), answer
        if isinstance(answer, Changed) and last is not None:
            self.state = replace(self.state, averages={**self.state.averages, name: _Average(spec, last)})
            self._published()

    @rule(spec=st.sampled_from((*_FIRST, *_OTHERS)))
    def remove(self, spec: str) -> None:
        """Remove an average, unless no other has weights."""
        name = parse_average(spec).name
        others = {other: average for other, average in self.state.averages.items() if other != name}
        answer = self.core.remove("r", name)
        if name in self.state.averages and any(average.steps for average in others.values()):
            assert answer == Changed(name)
            self.state = replace(self.state, averages=others)
            self._published()
        else:
            assert isinstance(answer, Unchanged), answer

    @rule(
        ending=st.sampled_from(["none", "leave", "finish", "restart"]),
        back=st.integers(-3, 8),
        reconnect=st.booleans(),
        gives_units=st.booleans(),
    )
    def join(self, ending: str, back: int, reconnect: bool, gives_units: bool) -> None:
        """Join again, after the session ended in one of several ways, at a later or an earlier step."""
        self._end(ending)
        last = self.state.last_step
        first_step = max(1, (self.state.origin if last is None else last) + 1 - back)
        answer = self._join(first_step, reconnect=reconnect, gives_units=gives_units)
        if last is None:
            self.state = _new_state(first_step - 1)
            assert joined(answer).continuation == "new"
        elif reconnect or first_step > last:
            assert joined(answer).continuation == "continued"
        elif self._goes_back(first_step - 1):
            assert joined(answer).continuation == "rewound"
        else:
            assert isinstance(answer, Refused), answer
            joined(self._join(last + 1, gives_units=gives_units))
        self.gave_units = gives_units

    @precondition(lambda self: self.state.last_step is not None)
    @rule()
    def compare(self) -> None:
        """Every version has the ledger of the model, and an exponential average is that of its replay in float64."""
        versions = versions_by_average(self.core.publish("r"))
        self._published()
        assert set(versions) == {name for name, average in self.state.averages.items() if average.steps}
        for name, version in versions.items():
            average, ledger = (
                self.state.averages[name],
                json.loads((version.folder / "version.json").read_text())["ledger"],
            )
            assert ledger["origin"] == average.origin
            assert tuple(ledger["set"]) == average.replaced
            assert tuple(ledger_steps(ledger)) == average.steps
            if name in _DECAYS:
                expected = replay(ledger, _DECAYS[name], _weights)
                assert largest_difference(expected, self.core.load(version)) <= bound(ledger, _DECAYS[name], 1.0)

    @invariant()
    def no_error_is_hidden(self) -> None:
        """Not one error was unexpected, and the threads run."""
        assert self.core.telemetry.registry.get_sample_value("ema_internal_errors_total") == 0
        assert self.core.averager.is_alive()

    def teardown(self) -> None:
        """Compare once more, and stop."""
        try:
            if self.state.last_step is not None:
                self.compare()
        finally:
            self.core.stop()
            self.folder.cleanup()

    def _started(self) -> ServerCore:
        core = ServerCore(Path(self.folder.name), keep_generations=1000)
        core.start()
        return core

    def _join(self, first_step: int, *, reconnect: bool = False, gives_units: bool) -> Joined | Refused:
        units = _UNITS if gives_units else UNKNOWN
        return self.core.join("r", _MANIFEST, _FIRST, first_step=first_step, reconnect=reconnect, step_units=units)

    def _end(self, ending: str) -> None:
        if ending == "leave":
            self.core.leave("r")
        elif ending == "finish":
            durable(self.core.finish("r"))
        elif ending == "restart":
            assert self.core.stop()
            self.core = self._started()
        if ending != "none":
            self._published()

    def _published(self) -> None:
        if self.state.last_step is not None:
            self.generations.append(self.state)

    def _goes_back(self, step: int) -> bool:
        """Go back to the newest generation at or before `step`, if there is one, with the averages of now."""
        found = next((old for old in reversed(self.generations) if (old.last_step or 0) <= step), None)
        if found is None or found.last_step is None:
            return False
        averages = {}
        for name, average in self.state.averages.items():
            old = found.averages.get(name)
            same = old is not None and old.origin == average.origin
            averages[name] = old if old is not None and same else _Average(average.spec, found.last_step)
        self.state = replace(found, averages=averages)
        self._published()
        return True


Sequences.TestCase.settings = settings(
    max_examples=examples(15), stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)
TestSequences = pytest.mark.timeout(500)(Sequences.TestCase)
