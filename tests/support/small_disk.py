"""`ema serve` with a data folder on a separate small disk: a tmpfs that only the server's process sees.

The mount lives in a mount namespace, which needs no privileges where the kernel allows user namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.processes import Process

_UNSHARE = ("unshare", "--map-root-user", "--mount")
_EXEC = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"


def can_mount(folder: Path) -> bool:
    """Whether this system allows mounting a tmpfs in a user namespace."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
    return tried.returncode == 0


class SmallDiskProcess(Process):
    """`ema serve` on a disk of `mount_options`, after `prepare` (shell; `$0` is the data folder) was run there."""

    def __init__(self, data: Path, mount_options: str, prepare: str = "true", *, remount: str = "") -> None:
        data.mkdir(exist_ok=True)
        self.data = data
        again = f"mount -o remount,{remount} $0 || exit 9" if remount else "true"
        script = f'mount -t tmpfs -o {mount_options} tmpfs "$0" || exit 9; {prepare}; {again}; exec "$@"'
        serve = ("-m", "ema_cli", "serve", "--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data))
        super().__init__("-c", _EXEC, *_UNSHARE, "sh", "-c", script, str(data), sys.executable, *serve)

    def ready(self) -> dict[str, str]:
        """The addresses that it printed."""
        found: dict[str, str] = json.loads(self.wait_line(lambda line: line.startswith("{")))
        return found

    @property
    def disk(self) -> Path:
        """The data folder as its process sees it."""
        return Path(f"/proc/{self.popen.pid}/root{self.data}")

    def fill(self) -> Path:
        """Fill the disk; returns the file to delete."""
        ballast = self.disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                while _written(file.fileno(), size):
                    pass
        return ballast


def _written(fd: int, size: int) -> bool:
    try:
        return os.write(fd, bytes(size)) > 0
    except OSError:
        return False
