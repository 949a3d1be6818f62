"""A server started as users start it, in a temporary folder and on given cores; its memory, and a trainer of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from benchmarks.machine import all_cores, folder_in_memory, pinned
from ema_cli.demo.child import Child
from trainer_client import EmaClient

START_S = 120.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `folder` holds its data and the files of a benchmark."""

    zmq: str
    http: str
    pid: int
    folder: Path

    @property
    def data(self) -> Path:
        """The server's data folder."""
        return self.folder / "data"


@contextmanager
def serving(disk_bytes: int, cores: frozenset[int] | None = None) -> Iterator[Server]:
    """A server on `cores` that publishes on request and when it stops.

    Args:
        disk_bytes: upper bound of what it writes.
        cores: where it may run (default: all cores).
    """
    options = ("--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--publish-every-seconds", "0")
    with folder_in_memory(disk_bytes) as folder:
        command = ["-m", "ema_cli", "serve", "--data", str(folder / "data"), *options]
        with pinned(cores or all_cores()):
            child = Child("server", command, folder / "server.log")
        with child:
            ready = child.first_line(START_S)
            yield Server(ready["zmq"], ready["http"], ready["pid"], folder)


def pss_bytes(pid: int) -> int:
    """Resident memory of a process, in bytes; pages shared with other processes count in proportion."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/{pid}/smaps_rollup has no line 'Pss:': memory needs Linux 4.14 or newer")


@contextmanager
def streaming(
    endpoint: str, run: str, lane: Literal["shm", "zmq"], model: nn.Module, averages: Sequence[str] = ("ema:0.9999",)
) -> Iterator[Callable[[int], float]]:
    """A function that streams a number of snapshots, and returns the seconds until the last one was applied."""
    client = EmaClient(endpoint, run, list(averages), when_behind="wait", lane=lane)

    def stream(snapshots: int) -> float:
        started = time.perf_counter()
        for _ in range(snapshots):
            client.update(model)
        if not client.flush():
            raise TimeoutError("the server did not apply what was sent within a minute")
        return time.perf_counter() - started

    try:
        yield stream
    finally:
        client.close()
