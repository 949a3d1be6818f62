"""Deletes a run that no trainer streams: its generations, derived versions, ring, metrics and leases.

The folder is renamed first, which makes the deletion durable. What a crash leaves is completed at the next start.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ema_server.averager.active_run import Resources
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import Deleted, DeleteRun, Unchanged, WhyNot

logger = logging.getLogger("ema")


def delete(runs: ActiveRuns, job: DeleteRun) -> None:
    """Delete the run, or say why not. Waits until the publisher is done with it."""
    name, active, resources = job.run, runs.get(job.run), runs.resources
    if active is None and resources.statuses.get(name) is None and not resources.data_dir.has_folder(name):
        job.reply(Unchanged(WhyNot.NO_SUCH_RUN, f"run {name!r} does not exist"))
        return
    if active is not None and not active.departed:
        job.reply(Unchanged(WhyNot.STREAMING, _streaming(name)))
        return
    if active is not None and not active.is_idle:
        runs.hold(job)
        return
    try:
        folder = resources.data_dir.set_deleted(name)
    except OSError as error:
        job.reply(Unchanged(WhyNot.NOT_DURABLE, f"run {name!r} cannot be deleted: {error.strerror or error}"))
        return
    if active is not None:
        runs.forget(active)
    _forget(resources, name, folder)
    logger.info("run %s is deleted", name)
    job.reply(Deleted())


def erase(resources: Resources, name: str) -> None:
    """Delete a run that is not in memory.

    Raises:
        OSError: the disk refuses; nothing has changed.
    """
    _forget(resources, name, resources.data_dir.set_deleted(name))


def _forget(resources: Resources, name: str, folder: Path | None) -> None:
    """Remove what other parts know of a run whose folder has been renamed, and have the rest erased."""
    resources.catalog.delete(name)
    resources.ring.forget(name)
    resources.statuses.delete(name, resources.now())
    if folder is not None:
        resources.erase(name, folder)


def _streaming(name: str) -> str:
    return (
        f"run {name!r} is being streamed: end its trainer first. A trainer that was killed or lost its network counts "
        "as gone after a minute of silence"
    )
