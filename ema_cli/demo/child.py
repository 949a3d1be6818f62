"""Starts, watches and stops one process of the demo, which prints JSON lines and logs to a file."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

_STOP_S = 30.0  # a server writes its last generation meanwhile
_LAST_LINES = 15


class ProcessFailed(Exception):
    """A process of the demo failed; the text names it, says why, and shows the end of its log."""


class Child:
    """`python` with `arguments`: its stdout is JSON lines, its stderr the file `log`. Leaving the context stops it."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        with log.open("wb") as errors:
            # Its own session: Ctrl-C reaches only the demo, which then stops its processes in order.
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(),
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name=f"{name} stdout")
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def lines(self) -> Iterator[dict[str, Any]]:
        """The JSON lines since the last call; after the end of the process, all remaining ones."""
        if not self.running:
            self._reader.join()
        while not self._lines.empty():
            yield self._lines.get()

    def first_line(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the first JSON line.

        Raises:
            ProcessFailed: it ended before, or printed nothing in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            running = self.running
            for line in self.lines():
                return line
            if not running:
                raise self.failure()
            time.sleep(0.05)
        raise self.failure(f"printed nothing for {timeout_s:g} s")

    def check(self) -> None:
        """Raise if it has ended with a non-zero exit code.

        Raises:
            ProcessFailed: it has ended so.
        """
        if not self.running and self._process.returncode != 0:
            raise self.failure()

    def stop(self) -> None:
        """Send SIGTERM, and wait for its end.

        Raises:
            ProcessFailed: it did not end in time, or with a non-zero exit code.
        """
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {_STOP_S:g} s of SIGTERM") from None
        self.check()

    def failure(self, reason: str | None = None) -> ProcessFailed:
        """The error to raise: the name, `reason` (default: how it ended), and the last lines of its log."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        tail = "".join(f"\n  {line}" for line in lines) or "\n  (it is empty)"
        return ProcessFailed(f"the {self.name} {reason or self._ending()}; the end of {self._log}:{tail}")

    def _ending(self) -> str:
        code = self._process.poll()
        if code is None:
            return "is still running"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            self._process.send_signal(number)

    def _read(self, stdout: IO[bytes]) -> None:
        with stdout:
            for line in stdout:
                self._lines.put(json.loads(line))


def _environment() -> dict[str, str]:
    """This process's environment without settings, which are for another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EMA_")}
