"""A server as users start it, in a temporary folder.

Comes in: cores. Goes out: its addresses and process id, and its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import all_cores, folder_in_memory, pinned
from ema_cli.demo.child import Child

START_S = 120.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `folder` holds its data and whatever a benchmark puts beside it."""

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
    """A server on `cores` that publishes when it is asked to, and at the end.

    Args:
        disk_bytes: what it will write at most.
        cores: where it may run; everywhere by default.
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
    """Resident memory of a process, in bytes; what it shares with others counts in proportion."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/{pid}/smaps_rollup has no line 'Pss:': memory needs Linux 4.14 or newer")
