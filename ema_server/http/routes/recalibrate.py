"""From uploaded buffers to the version that has them, or to the problem that says why they do not fit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ema_proto.errors import LocalProtocolError
from ema_proto.names import check_name
from ema_server.derived.recalibration import RECALIBRATED, SUFFIX, BadBuffers, Recalibrated, recalibrate
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, is_alias
from ema_server.http.routes.derive import busy, derive
from ema_server.http.services import Services
from ema_server.storage.catalog import Version

UPLOADS_MAX = 4  # bodies in memory at once, until their versions are made
BODY_S = 120.0  # 16 MiB at 140 kB/s


class Uploads:
    """Counts the bodies with tensors that are in memory. On the event loop alone."""

    def __init__(self) -> None:
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Inside the block there is one more.

        Raises:
            Problem: there are as many as may be.
        """
        if self._count >= UPLOADS_MAX:
            raise busy(
                f"{self._count} uploads are being received or worked on, the most that may: try again in a while"
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


def find_base(services: Services, run: str, average: str, rev: str) -> Version:
    """The version to make another one of.

    Raises:
        Problem: there is none, or none can be made of it.
    """
    base = find_version(services, run, average, rev)
    if is_alias(rev):
        raise Problem(Code.INVALID, f"{rev!r} is an alias and may move: give the 40 hex digits, now {base.id}")
    _check_name(services, base)
    return base


async def received(body: Callable[[], Awaitable[bytes]]) -> bytes:
    """The body of a request.

    Raises:
        Problem: it has not come in time.
    """
    try:
        async with asyncio.timeout(BODY_S):
            return await body()
    except TimeoutError:
        raise Problem(Code.UPLOAD_TIMEOUT, f"the body was not there after {BODY_S:g} s: send it again") from None


async def recalibrate_version(services: Services, base: Version, data: bytes) -> Recalibrated:
    """Make a version of another one, with buffers in place of its own.

    Raises:
        Problem: the name was taken meanwhile, the buffers do not fit, or it cannot be written.
    """
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
    status = services.statuses.get(base.run)
    kept = () if status is None else status.averages
    known = services.catalog.versions(base.run, name)
    if any(one.name.lower() == name.lower() for one in kept) or any(one.derived != RECALIBRATED for one in known):
        detail = f"run {base.run!r} has another average {name!r}, and the new version would be listed under that name"
        raise Problem(Code.NAME_TAKEN, detail)
