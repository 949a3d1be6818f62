"""Derived versions as requests see them: they are deleted here, without blocking the event loop."""

from __future__ import annotations

import anyio.to_thread

from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, is_alias
from ema_server.http.services import Services


async def delete_derived(services: Services, run: str, average: str, rev: str) -> None:
    """Delete a derived version.

    Raises:
        Problem: there is none of this id, it is not a derived one, or a reader holds it.
    """
    version = find_version(services, run, average, rev)
    if is_alias(rev):
        raise Problem(Code.INVALID, f"{rev!r} is an alias and may move: give the 40 hex digits, now {version.id}")
    if version.derived is None:
        detail = f"version {version.id} belongs to a generation: it goes when newer ones have come (--keep-generations)"
        raise Problem(Code.NOT_DERIVED, detail)
    if not await anyio.to_thread.run_sync(services.derived.delete, version):
        detail = f"version {version.id} is being downloaded or evaluated, or was a moment ago: try again in a minute"
        raise Problem(Code.VERSION_HELD, detail)
