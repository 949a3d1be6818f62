"""What a JOIN leads to, for each `resume` and everything that may be known of the run."""

from __future__ import annotations

import pytest
import torch

from ema_proto.averages.specs import parse_averages
from ema_proto.errors import RejectCode
from ema_proto.wire import messages
from ema_proto.wire.messages import Resume
from ema_server.averager.jobs import Refused
from ema_server.averager.join_policy import Decision, GoBack, Known, decide
from support.server_core import manifest_of

_MANIFEST = manifest_of({"w": torch.zeros(3), "b": torch.zeros(2)})
_OTHER = manifest_of({"w": torch.zeros(4), "b": torch.zeros(2)})
_KNOWN = Known(100, _MANIFEST, {"raw": "raw", "ema-0.9": "ema:0.9"}, (90, 60))


def _decide(
    known: Known | None,
    *,
    resume: Resume = "auto",
    first_step: int = 101,
    reconnect: bool = False,
    averages: str = "raw,ema:0.9",
    other: bool = False,
) -> Decision | GoBack | Refused:
    manifest = _OTHER if other else _MANIFEST
    specs = parse_averages(averages)
    join = messages.Join(
        run="r", first_step=first_step, manifest=manifest, averages=specs, resume=resume, reconnect=reconnect
    )
    return decide(join, known)


@pytest.mark.parametrize(
    ("known", "resume", "first_step", "reconnect", "expected"),
    [
        (None, "auto", 1, False, Decision.START),
        (None, "never", 1, False, Decision.START),
        (None, "auto", 500, True, Decision.START),
        (None, "must", 500, True, Decision.START),
        (_KNOWN, "auto", 101, False, Decision.CONTINUE),
        (_KNOWN, "must", 101, False, Decision.CONTINUE),
        (_KNOWN, "auto", 5000, False, Decision.CONTINUE),
        (_KNOWN, "auto", 100, False, GoBack(99)),
        (_KNOWN, "must", 100, False, GoBack(99)),
        (_KNOWN, "auto", 61, False, GoBack(60)),
        (_KNOWN, "never", 1, False, Decision.SET_ASIDE),
        (_KNOWN, "never", 101, False, Decision.SET_ASIDE),
        (_KNOWN, "never", 1, True, Decision.CONTINUE),
        (_KNOWN, "auto", 1, True, Decision.CONTINUE),
        (_KNOWN, "must", 1, True, Decision.CONTINUE),
    ],
)
def test_join_decisions(
    known: Known | None, resume: Resume, first_step: int, reconnect: bool, expected: Decision | GoBack
) -> None:
    assert _decide(known, resume=resume, first_step=first_step, reconnect=reconnect) == expected


def test_resume_must_needs_a_run_to_continue() -> None:
    refused = _decide(None, resume="must")

    assert isinstance(refused, Refused)
    assert refused.code is RejectCode.NOTHING_TO_CONTINUE
    assert "check its name, or join with resume='auto'" in refused.text


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_rewind_needs_an_older_generation(resume: Resume) -> None:
    refused = _decide(_KNOWN, resume=resume, first_step=60)

    assert isinstance(refused, Refused)
    assert refused.code is RejectCode.NO_GENERATION
    for part in (
        "is at step 100",
        "before step 60",
        "at steps 60, 90",
        "step=",
        "resume='never'",
        "another run name",
    ):
        assert part in refused.text


def test_refused_rewind_names_a_bounded_number_of_generations() -> None:
    refused = _decide(Known(100, _MANIFEST, {"raw": "raw", "ema-0.9": "ema:0.9"}, tuple(range(20, 60))), first_step=1)

    assert isinstance(refused, Refused)
    assert "at steps 20, 21, 22, 23, 24, 25, 26, 27, ..." in refused.text


@pytest.mark.parametrize("reconnect", [False, True])
def test_changed_model_is_refused_with_the_differing_tensor(reconnect: bool) -> None:
    refused = _decide(_KNOWN, other=True, reconnect=reconnect)

    assert isinstance(refused, Refused)
    assert refused.code is RejectCode.MANIFEST_CHANGED
    assert "'w' is F32[4], it was F32[3]" in refused.text
    assert "another run name, or resume='never'" in refused.text


def test_changed_model_may_follow_a_run_that_is_set_aside() -> None:
    assert _decide(_KNOWN, other=True, resume="never") == Decision.SET_ASIDE


def test_join_may_list_some_of_the_averages() -> None:
    assert _decide(_KNOWN, averages="raw") == Decision.CONTINUE


def test_unknown_average_is_refused() -> None:
    refused = _decide(_KNOWN, averages="raw,ema:0.5")

    assert isinstance(refused, Refused)
    assert refused.code is RejectCode.AVERAGE_CHANGED
    assert "no average 'ema-0.5', it has raw, ema-0.9: join with these, and add others" in refused.text


def test_unknown_average_is_refused_with_a_quoted_shell_command() -> None:
    refused = _decide(_KNOWN, averages="raw,ema:0.5,include=a|b*,name=half")

    assert isinstance(refused, Refused)
    assert "(ema averages r --add 'ema:0.5,include=a|b*' --name half)" in refused.text


def test_known_name_with_another_rule_is_refused() -> None:
    known = Known(100, _MANIFEST, {"raw": "raw", "ema-0.9": "ema:0.8"}, ())
    refused = _decide(known)

    assert isinstance(refused, Refused)
    assert refused.code is RejectCode.AVERAGE_CHANGED
    assert "'ema-0.9' of run 'r' is ema:0.8, not ema:0.9" in refused.text


@pytest.mark.parametrize(("spec", "is_let_in"), [("ema:0.5", True), ("ema:0.6,name=ema-0.5", False)])
def test_removed_average_may_still_be_listed(spec: str, is_let_in: bool) -> None:
    known = Known(100, _MANIFEST, {"raw": "raw"}, (), frozenset({("ema-0.5", "ema:0.5")}))

    assert (_decide(known, averages=f"raw,{spec}") == Decision.CONTINUE) is is_let_in
