"""Deletes the oldest of the short runs that a trainer leaves which begins again and again.

Each start from step 0 sets the run before it aside. Of a name's earlier runs that ended after a few steps the newest
are kept. A run counts as short if it was set aside and not continued since, took fewer than `short_run_steps` steps,
was not finished, has neither a checkpoint's generation nor derived versions, and is not being read.
"""

from __future__ import annotations

import logging

from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.delete import erase
from ema_server.storage.datadir import is_dated
from ema_server.storage.generation import read_record
from ema_server.storage.records import BrokenGeneration

logger = logging.getLogger("ema")


def delete_short_runs(runs: ActiveRuns, name: str) -> None:
    """Delete the oldest short runs that were set aside under `name`, beyond those that are kept."""
    config, data_dir = runs.resources.config, runs.resources.data_dir
    if not config.short_run_steps:
        return
    dated = [run for run in data_dir.runs() if is_dated(run)]
    begun = {run: created for run in dated if (created := _begin_if_short(runs, name, run)) is not None}
    oldest_first = sorted(begun, key=lambda run: (begun[run], run))
    for run in oldest_first[: -config.keep_short_runs]:
        try:
            erase(runs.resources, run)
        except OSError as error:
            logger.warning("run %s, of a few steps, cannot be deleted: %s", run, error)
            return
        logger.info(
            "run %s is deleted: it took fewer than %d steps, and %d newer ones of run %s that did are kept",
            *(run, config.short_run_steps, config.keep_short_runs, name),
        )


def _begin_if_short(runs: ActiveRuns, name: str, run: str) -> str | None:
    """When a run began, if it is a short run that was set aside under `name`; else None."""
    catalog = runs.resources.catalog
    generations = catalog.generations(run)
    if runs.get(run) is not None or not generations or any(each.pinned or each.finished for each in generations):
        return None
    if catalog.derived(run) or catalog.is_read(run):
        return None
    try:
        record = read_record(generations[0].folder).run
        is_short = record.step - int(record.ledger["origin"]) < runs.resources.config.short_run_steps
    except (BrokenGeneration, OSError, KeyError, TypeError, ValueError):
        return None  # what cannot be read is kept
    return record.created if is_short and record.run == name else None
