"""Reads the scores of a run's versions over HTTP in a thread, for the log of a training framework."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Final

from trainer_client.pulling.average_reader import open_reader

log = logging.getLogger("ema")

_PERIOD_S: Final = 5.0
_THREAD: Final = "ema-scores"


@dataclass(frozen=True, slots=True)
class Scores:
    """The metrics of one version, by name; those of a task other than `default` are named `TASK/METRIC`."""

    average: str
    step: int
    metrics: dict[str, float]


class ScoreReader:
    """The scores of one run as they arrive; the training thread never waits for them.

    Args:
        url: the server's address for readers.
        token: the server's token; default `EMA_TOKEN`.
        run: the run.
        skip_known: leave out the scores that the first read finds, as after a resume.

    Raises:
        SettingsError: `ema_reader` cannot be imported, or `url` is not an HTTP address.
    """

    def __init__(self, url: str, token: str | None, run: str, *, skip_known: bool) -> None:
        self._reader = open_reader(url, token)
        self._run = run
        self._skip = skip_known
        self._returned: dict[tuple[str, str], float] = {}  # by version and metric
        self._new: list[Scores] = []
        self._failed = False
        self._averages: set[str] = set()  # of the run
        self._scored: set[tuple[str, int]] = set()  # averages and steps that have scores
        self._changed = threading.Condition()
        self._closing = threading.Event()
        logging.getLogger("httpx2").addFilter(_is_not_periodic)
        # A daemon: a request that hangs must not keep the process from exiting.
        threading.Thread(target=self._read_periodically, name=_THREAD, daemon=True).start()

    def take(self) -> list[Scores]:
        """The scores that were read since the last call, each once, by step and average."""
        with self._changed:
            new, self._new = self._new, []
        return new

    def wait(self, step: int | None, timeout_s: float) -> None:
        """Wait until every average has a score at `step`, at most `timeout_s` seconds; log it if they lack one then."""
        with self._changed:
            complete = self._changed.wait_for(lambda: self._are_scored(step), timeout_s)
        if not complete and timeout_s > 0:
            text = "ema: run %s: after %g s not every average has a score at step %s on %s: is an evaluation running? "
            text += "`ema metrics` lists scores that arrive later"
            log.warning(text, self._run, timeout_s, step, self._reader.url)

    def close(self) -> None:
        """Stop reading; does not wait for a request that is under way."""
        self._closing.set()

    def _read_periodically(self) -> None:
        while not self._closing.is_set():
            self._read()
            self._closing.wait(_PERIOD_S)
        self._reader.close()

    def _read(self) -> None:
        from ema_reader import NotFound, ReaderError
        from ema_reader.scores import scores_of

        try:
            averages = {average.name for average in self._reader.run(self._run).averages if average.step is not None}
            scores = scores_of(self._reader.metrics(self._run))
        except NotFound:
            return
        except ReaderError as error:
            if not self._failed:
                log.warning("ema: the scores of run %s cannot be read, training goes on: %s", self._run, error)
            self._failed = True
            return
        self._failed = False
        found = [Scores(each.average, each.step, self._changes(each.version, each.metrics)) for each in scores]
        with self._changed:
            self._averages = averages
            self._scored = {(score.average, score.step) for score in scores}
            self._new += [] if self._skip else [scores for scores in found if scores.metrics]
            self._skip = False
            self._changed.notify_all()

    def _are_scored(self, step: int | None) -> bool:
        return bool(self._averages) and all((name, step) in self._scored for name in self._averages)

    def _changes(self, version: str, metrics: dict[str, float]) -> dict[str, float]:
        """Those of the metrics that are new or have another value."""
        known = self._returned
        changed = {name: value for name, value in metrics.items() if known.get((version, name)) != value}
        known.update({(version, name): value for name, value in changed.items()})
        return changed


def _is_not_periodic(record: logging.LogRecord) -> bool:
    """False for the lines with which the HTTP client logs the requests of a score reader."""
    return record.threadName != _THREAD
