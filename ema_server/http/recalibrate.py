"""From uploaded buffers to the version that has them, or to the problem that says why they do not fit."""

from __future__ import annotations

from functools import partial

from ema_proto.errors import LocalProtocolError
from ema_proto.names import check_name
from ema_server.catalog import Version
from ema_server.http.derive import derive
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, is_alias
from ema_server.http.services import Services
from ema_server.recalibration import RECALIBRATED, SUFFIX, BadBuffers, Recalibrated, recalibrate


async def recalibrate_version(services: Services, run: str, average: str, rev: str, data: bytes) -> Recalibrated:
    """Make a version of another one, with buffers in place of its own.

    Raises:
        Problem: there is no such version, the buffers do not fit, or it cannot be written.
    """
    base = find_version(services, run, average, rev)
    if is_alias(rev):
        raise Problem(Code.INVALID, f"{rev!r} is an alias and may move: give the 40 hex digits, now {base.id}")
    _check_name(services, base)
    nbytes = sum(file.size for file in base.files)
    try:
        return await derive(services, nbytes, partial(recalibrate, services.deriving, base, data))
    except BadBuffers as error:
        raise Problem(Code.INVALID, str(error)) from None


def _check_name(services: Services, base: Version) -> None:
    name = base.average + SUFFIX
    if base.derived == RECALIBRATED:
        detail = f"version {base.id} has recomputed buffers already: recompute those of {base.average[: -len(SUFFIX)]}"
        raise Problem(Code.INVALID, detail)
    try:
        check_name("average", name)
    except LocalProtocolError as error:
        raise Problem(Code.INVALID, f"the new version would be listed as {name!r}: {error}") from None
    status = services.board.get(base.run)
    kept = () if status is None else status.averages
    known = services.catalog.versions(base.run, name)
    if any(one.name == name for one in kept) or any(one.derived != RECALIBRATED for one in known):
        detail = f"run {base.run!r} has another average {name!r}, and the new version would be listed under that name"
        raise Problem(Code.NAME_TAKEN, detail)
