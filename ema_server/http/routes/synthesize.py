"""From a wish for another power average to its version, or to the problem that says why the ring does not suffice."""

from __future__ import annotations

from functools import partial

from ema_proto.averages.rules import PowerEma
from ema_proto.errors import LocalProtocolError
from ema_server.derived.plan import CannotSynthesize
from ema_server.derived.queue import NameTaken, Synthesized
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import run_status
from ema_server.http.routes.derive import derive
from ema_server.http.routes.derived_schemas import InputOut, SynthesizedOut, SynthesizeIn
from ema_server.http.schemas import VersionOut
from ema_server.http.services import Services
from ema_server.runs.status_store import RunStatus


async def synthesize(services: Services, run: str, body: SynthesizeIn) -> tuple[SynthesizedOut, bool]:
    """Make a power average of what is stored of a run; returns it and whether it is new.

    Raises:
        Problem: it cannot be made, or not under this name.
    """
    status = run_status(services, run)
    rule = _rule(body)
    _check_name(services, status, rule)
    work = partial(services.deriving.synthesize, status.run, rule, body.step)
    try:
        made = await derive(services, 2 * status.snapshot_bytes, work)  # float32 of what may be sent in 16 bits
    except CannotSynthesize as error:
        raise Problem(Code.CANNOT_SYNTHESIZE, f"run {run!r}: {error}") from None
    except NameTaken as error:
        raise Problem(Code.NAME_TAKEN, str(error)) from None
    return _shown(made), made.is_new


def _rule(body: SynthesizeIn) -> PowerEma:
    try:
        return PowerEma(body.sigma_rel, name=body.name or "", gamma=body.gamma)
    except LocalProtocolError as error:
        raise Problem(Code.INVALID, str(error)) from None


def _check_name(services: Services, status: RunStatus, rule: PowerEma) -> None:
    kept = {item.average for item in services.catalog.versions(status.run, rule.name) if item.derived is None}
    kept |= {average.name for average in status.averages if average.name.lower() == rule.name.lower()}
    if kept:
        detail = (
            f"run {status.run!r} keeps an average {min(kept)!r} itself: download that, or ask for this one under "
            "another name"
        )
        raise Problem(Code.NAME_TAKEN, detail)


def _shown(made: Synthesized) -> SynthesizedOut:
    facts = made.facts
    return SynthesizedOut(
        version=VersionOut.model_validate(made.version),
        sigma_rel=facts["sigma_rel"],
        gamma=facts["gamma"],
        origin=facts["origin"],
        estimated_error=facts["estimated_error"],
        amplification=facts["amplification"],
        rounding=facts["rounding"],
        warning=facts["warning"],
        inputs=tuple(InputOut(**part) for part in facts["inputs"]),
    )
