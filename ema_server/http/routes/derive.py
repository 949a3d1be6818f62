"""Derived versions as requests see them: made and deleted off the event loop, and what can go wrong as problems."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread

from ema_server.derived.queue import Busy, Stopped
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import RETRY_AFTER_S, find_version, is_alias
from ema_server.http.routes.readiness import needed_bytes
from ema_server.http.services import Services
from ema_server.storage.catalog import VersionGone
from ema_server.storage.records import BrokenGeneration
from ema_server.tensors.safetensors_file import BadModelFile

Result = TypeVar("Result")


async def derive(services: Services, nbytes: int, work: Callable[[], Result]) -> Result:
    """What `work` returns, done in the thread for derived versions when it is its turn.

    Args:
        services: of the server.
        nbytes: what it will write, about.
        work: makes the version.

    Raises:
        Problem: there is no room, the disk refuses, what is stored is damaged, too much is waiting already, or the
            server is stopping.
    """
    await anyio.to_thread.run_sync(_check_room, services, nbytes)
    try:
        return await services.deriving.run(work)
    except Busy as error:
        raise busy(str(error)) from None
    except Stopped:
        raise Problem(Code.NOT_READY, "the server has been asked to stop: ask again when it is back") from None
    except (BrokenGeneration, BadModelFile) as error:
        raise Problem(Code.DAMAGED, str(error)) from None
    except VersionGone as error:
        raise Problem(Code.DERIVE_FAILED, str(error)) from None
    except FileNotFoundError as error:
        detail = f"{error.filename} has been removed meanwhile: the run went back, or was set aside; ask again"
        raise Problem(Code.DERIVE_FAILED, detail) from None
    except OSError as error:
        raise Problem(Code.DERIVE_FAILED, f"it could not be written or read: {error.strerror or error}") from None


def busy(detail: str) -> Problem:
    """The problem of one who comes while there is enough to do."""
    return Problem(Code.BUSY, detail, headers={"Retry-After": str(RETRY_AFTER_S)})


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
    if not await anyio.to_thread.run_sync(services.deriving.store.delete, version):
        detail = f"version {version.id} is being downloaded or evaluated, or was a moment ago: try again in a minute"
        raise Problem(Code.VERSION_HELD, detail)


def _check_room(services: Services, nbytes: int) -> None:
    """A derived version must not take the room that the next generations need."""
    free, needed = shutil.disk_usage(services.data).free, needed_bytes(services)
    if free < needed + nbytes:
        detail = (
            f"{free} bytes are free, {nbytes} are needed for the version and {needed} must stay for the runs: delete "
            "what is not needed, for example other derived versions (DELETE …/versions/{id})"
        )
        raise Problem(Code.NO_ROOM, detail)
