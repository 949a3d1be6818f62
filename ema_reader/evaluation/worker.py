"""The evaluation worker: takes a lease of a version, loads and evaluates it, reports, and repeats.

The server decides which version is due: a requested validation first, else the rest of the step that was begun, else
the newest step's versions without metrics for the task. The worker survives a function that raises, an unreachable
server, and versions pruned before it loads them. When it is killed, another worker takes over its version.
`evaluate_version` does the same for one version of the caller's choice.
"""

from __future__ import annotations

import logging
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ema_reader.errors import LeaseLost, NotFound, ReaderError, RequestRefused, Unreachable, VerificationFailed
from ema_reader.evaluation.user_function import Evaluate, Measured, measured
from ema_reader.leases import LEASE_S, Heartbeat, Lease, Wanted
from ema_reader.reader import Reader
from ema_reader.values import Run, Version

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.25
PAUSE_S_MAX = 10.0
_ERROR_CHARS_MAX = 4000
_LOAD_ATTEMPTS = 3
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of evaluating one version: metrics, or the error that was reported instead. Times in seconds.

    `missing` has the metrics without a finite value, each with the reason.
    """

    version: Version
    metrics: dict[str, float]
    error: str | None
    seconds: float
    samples: int | None = None
    missing: dict[str, str] = field(default_factory=dict)


class EvaluationWorker:
    """Evaluates versions.

    Args:
        reader: the connection to the server.
        function: takes a state dict, returns metrics by name.
        run: the run, which need not exist yet; None: every run that has had a trainer since the server's start, without
            end.
        averages: which averages; empty for all.
        task: name under which metrics are reported.
        worker: name of this worker, default the host's; its reports replace its earlier ones.
        poll_s: seconds between two requests while nothing is due.
        every: evaluate every Nth generation of a run, and always the last one and requested ones.
        lease_s: seconds after its last heartbeat at which others may take over its version.
        device: where weights are loaded, as torch writes it.
    """

    def __init__(
        self,
        reader: Reader,
        function: Evaluate,
        run: str | None = None,
        averages: tuple[str, ...] = (),
        *,
        task: str = "default",
        worker: str | None = None,
        poll_s: float = 1.0,
        every: int = 1,
        lease_s: float = LEASE_S,
        device: str = "cpu",
    ) -> None:
        self._reader = reader
        self._function = function
        self._wanted = Wanted(worker or socket.gethostname(), task, run, averages, every, lease_s, poll_s)
        self._device = device
        self._traced: set[type[Exception]] = set()
        self._skip: list[str] = []
        self._last: dict[tuple[str, str], Outcome] = {}

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The averages whose last version could not be evaluated."""
        return tuple(outcome for outcome in self._last.values() if outcome.error is not None)

    def outcomes(self) -> Iterator[Outcome]:
        """Evaluate what is due, repeatedly; ends when the run is finished and its last versions are evaluated.

        Raises:
            NotFound: the run has no average of a given name.
            Unauthorized: the server requires a token, or another one.
        """
        run = None if self._wanted.run is None else self._wait_for_run(self._wanted.run)
        while True:
            self._check_averages(run)
            lease, held = retry_while_unreachable(lambda: self._reader.leases.ask(self._wanted, tuple(self._skip)))
            if lease is not None:
                outcome = self._evaluate(lease)
                if outcome is not None:
                    yield outcome
            elif run is not None and run.finished and not held:
                return
            else:
                time.sleep(self._wanted.poll_s)
            if run is not None:
                run = retry_while_unreachable(partial(self._reader.run, run.run))  # before asking: see Reader.wait

    def _wait_for_run(self, run: str) -> Run:
        waiting = False
        while True:
            try:
                return retry_while_unreachable(lambda: self._reader.run(run))
            except NotFound:
                if not waiting:
                    log.info("run %r does not exist yet; waiting for it (the runs are: %s)", run, self._known_runs())
                waiting = True
                time.sleep(self._wanted.poll_s)

    def _known_runs(self) -> str:
        names = [known.run for known in retry_while_unreachable(self._reader.runs)]
        return ", ".join(names) or "none yet"

    def _check_averages(self, run: Run | None) -> None:
        known = () if run is None else run.average_names
        for name in self._wanted.averages:
            if run is not None and known and name not in known:
                raise NotFound(f"run {run.run!r} has no average {name!r}; it has {', '.join(known)}")

    def _evaluate(self, lease: Lease) -> Outcome | None:
        version = lease.version
        try:
            outcome = evaluate_leased(self._reader, lease, self._function, self._device, self._traced)
        except NotFound:
            log.info("%s was deleted before it could be evaluated; skipped", version)
            self._skip.append(version.id)
            return None
        if outcome is None:
            return None
        self._last[version.run, version.average] = outcome
        if outcome.error is not None:
            self._skip.append(version.id)
        return outcome


def evaluate_version(
    reader: Reader,
    version: Version,
    function: Evaluate,
    task: str,
    device: str,
    traced: set[type[Exception]],
    poll_s: float = 1.0,
) -> Outcome | None:
    """Evaluate one version under a lease, or wait until another worker has evaluated it; None if that has happened.

    A version that has metrics for the task is not evaluated again; one whose evaluation failed is. `traced` is that of
    `measure`, `poll_s` the time in seconds between two requests.

    Raises:
        NotFound: the version has been deleted.
    """
    names = version.run, (version.average,)
    wanted = Wanted(socket.gethostname(), task, *names, poll_s=poll_s, version=version.id)
    waiting = False
    while True:
        lease, held = retry_while_unreachable(lambda: reader.leases.ask(wanted))
        if lease is not None:
            outcome = evaluate_leased(reader, lease, function, device, traced)
            if outcome is not None:
                return outcome
        elif not held:
            log.info("%s has metrics already", version)
            return None
        elif not waiting:
            log.info("%s is being evaluated by another worker; waiting for its result", version)
            waiting = True
        time.sleep(wanted.poll_s)


def evaluate_leased(
    reader: Reader, lease: Lease, function: Evaluate, device: str, traced: set[type[Exception]]
) -> Outcome | None:
    """Evaluate the version of a lease and end the lease with the outcome; None if another worker has taken it over.

    Raises:
        NotFound: the version has been deleted. The lease is given back, as after any exception.
    """
    settled = False
    try:
        with Heartbeat(reader.leases, lease):
            outcome = measure(reader, lease.version, function, device, traced)
        outcome = _report(reader, lease, outcome)
        settled = True
    except LeaseLost:
        log.warning("%s: another worker has taken it over; this result is discarded", lease.version)
        settled = True
        return None
    finally:
        if not settled:
            _give_back(reader, lease)
    return outcome


def _report(reader: Reader, lease: Lease, outcome: Outcome) -> Outcome:
    """Report the outcome; if the server refuses the metrics, report that as the error."""
    try:
        _send(reader, lease, outcome)
    except LeaseLost:
        raise
    except RequestRefused as refusal:
        outcome = Outcome(outcome.version, {}, f"the server refused the metrics: {refusal}", outcome.seconds)
        _send(reader, lease, outcome)
    return outcome


def _send(reader: Reader, lease: Lease, outcome: Outcome) -> None:
    settle = partial(reader.leases.settle, lease, outcome.metrics, missing=outcome.missing)
    retry_while_unreachable(lambda: settle(error=outcome.error, samples=outcome.samples, seconds=outcome.seconds))


def _give_back(reader: Reader, lease: Lease) -> None:
    """Return the lease, so that others need not wait until it expires."""
    try:
        reader.leases.give_back(lease)
    except ReaderError as error:
        log.info("%s could not be given back: %s", lease.version, error)


def measure(reader: Reader, version: Version, function: Evaluate, device: str, traced: set[type[Exception]]) -> Outcome:
    """Load a version and evaluate it. What the function raises, or a damaged file, is the error of the outcome.

    The function's error is logged: with its traceback if its type is not in `traced`, to which it is added; else in one
    line, since the next versions usually fail in the same way.

    Raises:
        NotFound: the version has been deleted.
        ReaderError: torch is not installed, or the server requires another token.
    """
    started = time.monotonic()
    found, error = Measured({}), None
    try:
        weights = _load(reader, version, device)
    except VerificationFailed as failure:
        return Outcome(version, {}, str(failure), time.monotonic() - started)
    try:
        found = measured(function(weights))
    except Exception as failure:  # the user's code: its error is the result to report
        error = f"{type(failure).__name__}: {str(failure) or _line_of(failure)}"[:_ERROR_CHARS_MAX]
        is_new = type(failure) not in traced
        log.error("evaluating %s failed: %s", version, error.splitlines()[0], exc_info=is_new)
        traced.add(type(failure))
    return Outcome(version, found.metrics, error, time.monotonic() - started, found.samples, found.missing)


def _line_of(failure: Exception) -> str:
    """Where an exception without a text was raised, such as that of a bare `assert`."""
    last = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{last.line} ({Path(last.filename).name}, line {last.lineno})"


def _load(reader: Reader, version: Version, device: str) -> dict[str, Tensor]:
    for attempt in range(1, _LOAD_ATTEMPTS + 1):
        try:
            return retry_while_unreachable(lambda: reader.load(version, device))
        except VerificationFailed:
            if attempt == _LOAD_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def retry_while_unreachable(call: Callable[[], _Value], *, sleep: Callable[[float], None] = time.sleep) -> _Value:
    """The result of `call`, repeated while the server is unreachable, without limit; logs the first failure.

    The pauses double up to `PAUSE_S_MAX` and are jittered, so that many workers do not return at the same moment.
    """
    failures = 0
    while True:
        try:
            result = call()
        except Unreachable as error:
            if failures == 0:
                log.warning("%s; waiting for it", error)
            pause_s = min(PAUSE_S_MAX, FIRST_PAUSE_S * 2.0**failures)
            failures = min(failures + 1, 10)
            sleep(pause_s * random.uniform(0.5, 1.0))
        else:
            if failures:
                log.info("the server answers again")
            return result
