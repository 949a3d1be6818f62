"""`Fetch`: finds and downloads the newer versions of one average, in a thread, while the training goes on."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from trainer_client.errors import AverageError, PlanError
from trainer_client.pulling.average_reader import AverageReader

log = logging.getLogger("ema")

_POLL_S: Final = 0.2
_POLL_MAX_S: Final = 10.0  # while the server does not answer
_PATIENCE_S: Final = 5.0  # for the version of the step that was asked for; then an older one is taken
_EXIT_S: Final = 5.0

_running: set[Fetch] = set()


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole, verified version."""

    id: str
    step: int
    weights: dict[str, Tensor]


class Fetch:
    """Has at most one version ready; a newer one is looked for when that has been taken.

    The thread ends as soon as a version is ready, so that an idle fetch has none.

    Args:
        reader: reads the run.
        average: name of the average.
        check: is called with the weights, in the thread; raises PlanError if they do not fit.

    Attributes:
        problem: what went wrong last; None once a version is ready.
        failed: why no version is fetched any longer; None while it works.
    """

    def __init__(self, reader: AverageReader, average: str, check: Callable[[dict[str, Tensor]], None]) -> None:
        self.problem: str | None = None
        self.failed: str | None = None
        self._reader = reader
        self._average = average
        self._check = check
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._goal = self._until = 0
        self._patient_until = 0.0
        self._known: str | None = None  # id of the version that was ready last
        self._ready: Fetched | None = None

    def want(self, goal: int, until: int) -> bool:
        """Look for a version unless one is ready; whether one is looked for, now or already.

        Args:
            goal: the step that the version should have at least. After 5 s an older one is taken.
            until: the step that it has at most. A search in progress takes the later of its own and this one.
        """
        with self._changed:
            self._until = max(self._until, until) if self._thread is not None else until
            if self._closed or self.failed is not None or self._ready is not None or self._thread is not None:
                return self._thread is not None
            self._goal, self._patient_until = goal, time.monotonic() + _PATIENCE_S
            # A daemon: a server that hangs must not keep the training from ending. See `_stop_all`.
            thread = threading.Thread(target=self._run, name="ema-pull", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process has too many threads
                self._report(error)
                return False
            self._thread = thread
            return True

    def take(self) -> Fetched | None:
        """The version that is ready, if any; it is then no longer held here."""
        with self._changed:
            fetched, self._ready = self._ready, None
            return fetched

    def wait(self, timeout_s: float) -> bool:
        """Wait until a version is ready, or none will be; whether one is."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed or self.failed is not None, timeout_s)
            return self._ready is not None

    def stop(self) -> None:
        """Have the thread end soon, and release what is ready. Does not wait."""
        if os.getpid() != self._pid:
            return  # the thread may have held the condition when this process was forked
        with self._changed:
            self._closed, self._ready = True, None
            self._changed.notify_all()

    def fail(self, problem: str) -> None:
        """Fetch nothing more."""
        log.error("ema: average %s is no longer pulled, training goes on: %s", self._average, problem)
        with self._changed:
            self.problem = self.failed = problem
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        _running.add(self)
        fetched, pause_s = None, _POLL_S
        while fetched is None and self.failed is None:
            try:
                fetched = self._try()
                pause_s = _POLL_S
            except PlanError as error:
                self.fail(str(error))
            # A full disk, say. Nothing of this is a reason to end a training.
            except Exception as error:  # noqa: BLE001
                self._report(error)
                pause_s = min(2 * pause_s, _POLL_MAX_S)
            with self._changed:
                if fetched is None and self._changed.wait_for(lambda: self._closed or self.failed, pause_s):
                    break
        with self._changed:
            if fetched is not None and not self._closed:
                self._ready, self._known, self.problem = fetched, fetched.id, None
            self._thread = None
            self._changed.notify_all()
        _running.discard(self)

    def _try(self) -> Fetched | None:
        """A version as it is wanted; None while there is none."""
        version = self._reader.newest(self._average, self._until)
        if version is None or version.id == self._known:
            return None
        if version.step < self._goal and time.monotonic() < self._patient_until:
            return None
        weights = self._reader.download(version, lambda: self._closed)
        if weights is None:
            return None
        self._check(weights)
        return Fetched(version.id, version.step, weights)

    def _report(self, error: Exception) -> None:
        text = str(error) if isinstance(error, AverageError) else repr(error)
        if self.problem is None:
            log.warning("ema: average %s cannot be pulled now, the module stays as it is: %s", self._average, text)
        self.problem = text


def _stop_all() -> None:
    """At exit: a thread inside torch would abort the interpreter."""
    fetches = tuple(_running)
    for fetch in fetches:
        fetch.stop()
    for fetch in fetches:
        fetch.join(_EXIT_S)


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_running.clear)
