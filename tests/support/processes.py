"""Real processes: the server as users start it, and scripts. All waits are bounded; all processes end with the test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

import httpx2

START_S = 60.0
SUPPORT = Path(__file__).parent


class Process:
    """A child process whose output is collected by threads, so that it never blocks on a full pipe."""

    def __init__(self, *command: str, env: dict[str, str] | None = None) -> None:
        self.lines: deque[str] = deque(maxlen=10_000)
        self.errors: deque[str] = deque(maxlen=2_000)
        self._changed = threading.Condition()
        self.popen = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": _import_path(),
                **(env or {}),
            },
        )
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.popen.stdout, self.lines), (self.popen.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], lines: deque[str]) -> None:
        for line in stream:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_line(self, wanted: Callable[[str], bool], timeout_s: float = START_S) -> str:
        """The first matching stdout line; fails with the process's stderr if there is none."""

        def found() -> list[str]:
            return [line for line in self.lines if wanted(line)]

        with self._changed:
            self._changed.wait_for(lambda: found() or self.popen.poll() is not None, timeout_s)
        matching = found()
        assert matching, f"no such line; exit {self.popen.poll()}; stderr:\n" + "\n".join(list(self.errors)[-40:])
        return matching[0]

    def wait(self, timeout_s: float = START_S) -> int:
        """Exit status."""
        code = self.popen.wait(timeout_s)
        for reader in self._readers:
            reader.join(5.0)
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.popen.kill()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.wait()
        for stream in (self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()


class ServerProcess(Process):
    """`ema serve` on the loopback. `zmq` and `http` are the addresses that it printed."""

    def __init__(self, data: Path, *options: str, zmq: str = "tcp://127.0.0.1:0", http: str = "127.0.0.1:0") -> None:
        # A server that gives way to everything else on a small machine answers too late for a test.
        own = ("--zmq", zmq, "--http", http, "--data", str(data), "--nice", "0")
        super().__init__("-m", "ema_cli", "serve", *own, *options)
        try:
            ready = json.loads(self.wait_line(lambda line: line.startswith("{")))
        except BaseException:
            self.__exit__()
            raise
        self.zmq: str = ready["zmq"]
        self.http: str = ready["http"]
        self.data = data

    @property
    def http_address(self) -> str:
        """HOST:PORT, to start another server at the same address."""
        return self.http.removeprefix("http://")

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        return self._response(path).json()

    def text(self, path: str) -> str:
        """Text of a GET."""
        return self._response(path).text

    def _response(self, path: str) -> httpx2.Response:
        response = httpx2.get(f"{self.http}{path}", timeout=30.0)
        response.raise_for_status()
        return response


def _import_path() -> str:
    """The tests' folder, so that children find `support`, then this process's PYTHONPATH."""
    return os.pathsep.join(filter(None, (str(SUPPORT.parent), os.environ.get("PYTHONPATH"))))
