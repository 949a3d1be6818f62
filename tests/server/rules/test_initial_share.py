"""How much of an average is still the weights that it began with, and when that is worth a warning."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from ema_proto.averages.specs import parse_average, parse_averages
from ema_proto.averages.step_units import UNKNOWN
from ema_server.averager.jobs import Applied
from ema_server.rules.initial_share import NOTABLE_SHARE, initial_share_warning
from ema_server.rules.weights import Span, weight_of
from support.server_core import ServerCore, durable, joined, manifest_of, running_core
from trainer_client import EmaClient

_ONE = {"w": torch.ones(3)}
_DEFAULT = parse_averages(inspect.signature(EmaClient).parameters["averages"].default)


def _share(spec: str, steps: int, every: int = 1) -> float:
    """The share of the first snapshot after so many steps."""
    rule, left, last = parse_average(spec), 1.0, 0
    for step in range(every, steps + 1, every):
        weight = weight_of(rule, Span(last, step, 0), UNKNOWN)
        left = left if last == 0 else left * (1.0 - (1.0 if weight is None else weight))
        last = step
    return left


@pytest.mark.parametrize(("steps", "share"), [(10, 0.999), (100, 0.990), (800, 0.923), (10_000, 0.368)])
def test_a_long_average_is_mostly_its_initial_weights_in_a_short_run(steps: int, share: float) -> None:
    assert _share("ema:0.9999", steps) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(
    ("steps", "most"), [(10, 1.1e-3), (100, 1e-15), (800, 1e-24), (10_000, 1e-24), (200_000, 1e-24)]
)
def test_the_default_average_forgets_its_initial_weights_at_any_length(steps: int, most: float, every: int) -> None:
    raw, ema = _DEFAULT

    assert (raw.name, raw.spec) == ("raw", "raw")
    assert (ema.name, ema.spec) == ("ema", "ema:0.9999,warmup=half_life")
    assert _share(ema.spec, steps, every) < most


@pytest.mark.parametrize(("steps", "age"), [(1000, 0.067), (10_000, 0.067), (100_000, 0.067), (1_000_000, 0.0095)])
def test_the_mean_age_of_the_default_average_is_at_most_7_percent_of_the_run(steps: int, age: float) -> None:
    rule, stride, mean = _DEFAULT[1], max(steps // 1000, 1), 0.0
    for step in range(2 * stride, steps + 1, stride):
        weight = weight_of(rule, Span(step - stride, step, 0), UNKNOWN)
        assert weight is not None
        mean = (1.0 - weight) * (mean + stride)

    assert mean / steps == pytest.approx(age, rel=0.02)


@pytest.mark.parametrize("share", [0.0, NOTABLE_SHARE, 1.0])
def test_a_small_share_or_a_copy_is_no_reason_for_a_warning(share: float) -> None:
    assert initial_share_warning(share) is None


def test_the_warning_contains_the_share() -> None:
    assert (initial_share_warning(0.923) or "").startswith("92% of it is still the weights that it began with")


def _run(core: ServerCore, steps: int, set_at: int) -> dict[str, str]:
    """Apply steps 1 to `steps` and a `set`; returns the warning of each average that has one."""
    for step in range(steps + 1):
        if step > 0:
            assert isinstance(core.apply("r", step, _ONE), Applied)
        if step == set_at:
            assert isinstance(core.apply("r", step, _ONE, "set"), Applied)
    status = core.settled("r", lambda status: status.step == steps)
    return {average.name: average.warning for average in status.averages if average.warning is not None}


_RULES = ("raw", "ema:0.5", "ema:0.9999", "ema:0.999,init=start", "ema:0.99,update_after=15", _DEFAULT[1].spec, "swa")


def test_status_and_the_end_of_a_run_warn_of_the_averages_that_are_too_long(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest_of(_ONE), _RULES))
        warned = _run(core, 20, set_at=0)
        warning = durable(core.finish("r")).warning

    assert {name: text.split()[0] for name, text in warned.items()} == {
        "ema-0.9999": "100%",
        "ema-0.999-init-start": "98%",
        "ema-0.99-update_after-15": "96%",
    }
    assert warning == "; ".join(f"average {name}: {text}" for name, text in warned.items())


@pytest.mark.parametrize(("set_at", "share"), [(20, None), (15, "95%")])
def test_a_set_in_mid_run_is_where_averages_begin(tmp_path: Path, set_at: int, share: str | None) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest_of(_ONE), ("raw", "ema:0.5", "ema:0.99")))
        warned = _run(core, 20, set_at)
        warning = durable(core.finish("r")).warning

    assert warned.get("ema-0.99", "").split()[:1] == ([] if share is None else [share])
    assert set(warned) <= {"ema-0.99"}
    assert (warning is None) == (share is None)
