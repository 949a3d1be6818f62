"""The ledger of a version: the steps inside it with their shares, streamed, since they may be millions."""

from __future__ import annotations

import heapq
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import StepUnits
from ema_proto.limits import STEP_MAX
from ema_server.http.conditional import immutable_headers
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, is_alias, path_of, reading, redirect
from ema_server.http.schemas import Out
from ema_server.http.services import Services, ServicesDep
from ema_server.rules.contributions import shares_of
from ema_server.rules.ledger import Ledger
from ema_server.storage.catalog import Version
from ema_server.storage.records import VERSION_FILE, StepUnitsRecord, newest_step_units, read_json

_PIECE = 1000  # steps
_ROUNDING = 1e-9  # by which ten million shares that add up to 1 may miss it

router = APIRouter(prefix="/v1/runs/{run}", tags=["averages"])


class LedgerOut(Out):
    """The steps inside a version with their shares, newest first; `rest` is the share of those left out.

    `spec` and `origin` of a blend are those of its first version.
    """

    run: str
    average: str
    version: str
    spec: str
    step: int
    origin: int
    steps: Annotated[tuple[tuple[int, float], ...], Field(description="Pairs of step and share.")]
    rest: float


@router.get(
    "/averages/{average}/versions/{rev}/ledger",
    operation_id="get_ledger",
    response_model=LedgerOut,
    responses={307: {"description": "`rev` is an alias: see Location"}},
)
async def ledger(
    run: str,
    average: str,
    rev: str,
    request: Request,
    services: ServicesDep,
    tail: Annotated[int | None, Query(ge=1, le=STEP_MAX)] = None,
) -> Response:
    """The steps inside a version with their shares, or the newest `tail` of them."""
    version = find_version(services, run, average, rev)
    if is_alias(rev):
        return redirect(request, version, f"{path_of(version)}/ledger")
    headers = immutable_headers(services, f'"{version.id}-ledger"')
    pieces = await anyio.to_thread.run_sync(_ledger_json, services, version, tail)
    if request.method == "HEAD":
        pieces = iter(())
    return StreamingResponse(pieces, media_type="application/json", headers=headers)


def _ledger_json(services: Services, version: Version, tail: int | None) -> Iterator[str]:
    """The ledger of a version as one JSON object in pieces: `steps` has step and share, newest first.

    `rest` is the share of what `tail` left out: steps beyond the newest `tail` ones. It may be negative in a blend with
    negative weights. A ledger of many gaps is megabytes
    of JSON, which are read and parsed before the first piece: not for the event loop.

    Raises:
        Problem: the version has none, since it was made of other versions; or it is gone, or damaged.
    """
    with reading(services, version):
        return _render(version, read_json((version.folder / VERSION_FILE).read_bytes()), tail)


def _render(version: Version, written: Mapping[str, Any], tail: int | None) -> Iterator[str]:
    parts = _parts(version, written)
    if len({part["run"] for part in parts}) > 1:
        detail = f"version {version.id} blends several runs, whose steps are not comparable: see its version.json"
        raise Problem(Code.NO_LEDGER, detail)
    ledgers = [Ledger.from_json(part["ledger"]) for part in parts]
    head = {
        "run": version.run,
        "average": version.average,
        "version": version.id,
        "spec": version.spec,
        "decay": version.decay,
        "half_life_steps": version.half_life_steps,
        "step": version.step,
        "origin": ledgers[0].origin,
    }
    total = math.fsum(part["weight"] for part in parts)
    shares = [_shares(part, ledger) for part, ledger in zip(parts, ledgers, strict=True)]
    return _pieces(head, islice(_added(shares), tail), total)


def _parts(version: Version, written: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The averages in a version, each with its weight: one, or those of a blend."""
    derived = written.get("derived")
    if derived is None:
        names = {"run": version.run, "average": version.average, "spec": version.spec}
        return [{"ledger": written["ledger"], "paces": written["paces"], **names, "weight": 1.0}]
    parts: Sequence[Mapping[str, Any]] | None = derived.get("ledgers")
    if not parts:
        detail = f"version {version.id} is derived and has no ledger: its version.json names its inputs"
        raise Problem(Code.NO_LEDGER, detail)
    return parts


def _shares(part: Mapping[str, Any], ledger: Ledger) -> Iterator[tuple[int, float]]:
    rule = parse_average(part["spec"], name=part["average"])
    history = [StepUnitsRecord(**units) for units in part["paces"]]
    weight = part["weight"]
    return ((step, weight * share) for step, share in shares_of(rule, ledger, _step_units_at(history)))


def _added(ledgers: Sequence[Iterator[tuple[int, float]]]) -> Iterator[tuple[int, float]]:
    """The steps of several ledgers, newest first, each with the sum of its shares."""
    if len(ledgers) == 1:
        yield from ledgers[0]
        return
    merged = heapq.merge(*ledgers, key=lambda entry: -entry[0])
    for step, entries in groupby(merged, key=lambda entry: entry[0]):
        yield step, math.fsum(share for _, share in entries)


def _step_units_at(history: Sequence[StepUnitsRecord]) -> Callable[[int], StepUnits]:
    starts = [units.from_step for units in history]
    return lambda step: newest_step_units(history[: max(1, bisect_right(starts, step))])


def _pieces(head: dict[str, Any], steps: Iterator[tuple[int, float]], total: float) -> Iterator[str]:
    yield json.dumps(head)[:-1] + ', "steps": ['
    rest, separator = total, ""
    while piece := list(islice(steps, _PIECE)):
        yield separator + ", ".join(f"[{step}, {share!r}]" for step, share in piece)
        separator = ", "
        for _, share in piece:
            rest -= share
    yield f'], "rest": {0.0 if -_ROUNDING < rest < 0 else rest!r}}}\n'
