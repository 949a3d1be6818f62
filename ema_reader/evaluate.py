"""The evaluation worker: poll, load, evaluate, report, until the run is finished. Comes in: a `Reader` and a function.

Each version is evaluated once; when several appeared since the last look, the newest of each average is taken. The
worker outlives a function that raises, a server that goes away, and versions that are pruned before it gets to them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ema_reader.errors import NotFound, RequestRefused, VerificationFailed
from ema_reader.functions import Evaluate, plain_metrics
from ema_reader.patience import patiently
from ema_reader.reader import Reader
from ema_reader.values import Run, Version

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_ERROR_CHARS_MAX = 4000
_LOAD_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of evaluating one version: metrics, or the error that was reported instead. Times in seconds."""

    version: Version
    metrics: dict[str, float]
    error: str | None
    seconds: float


class EvaluationWorker:
    """Evaluates the versions of one run.

    Args:
        reader: where they come from and where the metrics go.
        function: takes a state dict, returns metrics by name.
        run: the run, which need not exist yet.
        averages: which of its averages; empty for all.
        task: name under which metrics are reported.
        worker: name of this worker; what it reports replaces what it reported before.
        poll_s: pause between two looks.
    """

    def __init__(
        self,
        reader: Reader,
        function: Evaluate,
        run: str,
        averages: tuple[str, ...] = (),
        *,
        task: str = "default",
        worker: str | None = None,
        poll_s: float = 1.0,
    ) -> None:
        self._reader = reader
        self._function = function
        self._run = run
        self._averages = averages
        self._task = task
        self._worker = worker
        self._poll_s = poll_s
        self._done: set[str] = set()
        self._last: dict[str, Outcome] = {}

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The averages whose last version could not be evaluated."""
        return tuple(outcome for outcome in self._last.values() if outcome.error is not None)

    def outcomes(self) -> Iterator[Outcome]:
        """Evaluate what is new, again and again; ends when the run is finished and its last versions are done.

        Raises:
            NotFound: the run has no average of a given name.
            Unauthorized: the server wants another token.
        """
        run = self._wait_for_run()
        self._done = self._evaluated_before()
        while True:
            pending = patiently(partial(self._pending, run))
            for version in pending:
                outcome = self._evaluate(version)
                if outcome is not None:
                    yield outcome
            if run.finished and not pending:
                return
            if not pending:
                time.sleep(self._poll_s)
            run = patiently(lambda: self._reader.run(self._run))  # before its versions: see Reader.wait

    def _wait_for_run(self) -> Run:
        waiting = False
        while True:
            try:
                return patiently(lambda: self._reader.run(self._run))
            except NotFound:
                if not waiting:
                    log.info("run %r is not there yet; waiting for it", self._run)
                waiting = True
                time.sleep(self._poll_s)

    def _evaluated_before(self) -> set[str]:
        """Versions that have metrics for the task already. What failed before is tried again by a new worker."""
        rows = patiently(lambda: self._reader.metrics(self._run))
        return {row.version for row in rows if row.task == self._task and row.error is None}

    def _pending(self, run: Run) -> list[Version]:
        """The newest version of each average, where it is not done."""
        known = [average.name for average in run.averages]
        for name in self._averages:
            if known and name not in known:
                raise NotFound(f"run {run.run!r} has no average {name!r}; it has {', '.join(known)}")
        newest = (next(iter(self._reader.versions(run.run, name)), None) for name in self._averages or known)
        return [version for version in newest if version is not None and version.id not in self._done]

    def _evaluate(self, version: Version) -> Outcome | None:
        self._done.add(version.id)
        started = time.monotonic()
        try:
            metrics, error = self._measure(version)
            outcome = Outcome(version, metrics, error, time.monotonic() - started)
            self._last[version.average] = outcome = self._report(outcome)
        except NotFound:
            log.info("%s was pruned before it could be evaluated; skipped", version)
            return None
        return outcome

    def _measure(self, version: Version) -> tuple[dict[str, float], str | None]:
        try:
            weights = self._load(version)
        except VerificationFailed as failure:
            return {}, str(failure)
        try:
            return plain_metrics(self._function(weights)), None
        except Exception as failure:  # the user's code: what it raises is the result to report
            log.exception("evaluating %s failed", version)
            return {}, f"{type(failure).__name__}: {failure}"[:_ERROR_CHARS_MAX]

    def _load(self, version: Version) -> dict[str, Tensor]:
        for attempt in range(1, _LOAD_ATTEMPTS + 1):
            try:
                return patiently(lambda: self._reader.load(version))
            except VerificationFailed:
                if attempt == _LOAD_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _report(self, outcome: Outcome) -> Outcome:
        """Tell the server; when it refuses the metrics (a name too long), tell it that instead."""
        try:
            self._send(outcome)
        except RequestRefused as refusal:
            outcome = Outcome(outcome.version, {}, f"the server refused the metrics: {refusal}", outcome.seconds)
            self._send(outcome)
        return outcome

    def _send(self, outcome: Outcome) -> None:
        patiently(
            lambda: self._reader.report(
                outcome.version,
                outcome.metrics,
                task=self._task,
                worker=self._worker,
                error=outcome.error,
                seconds=outcome.seconds,
            )
        )
