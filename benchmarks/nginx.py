"""nginx as a rival: one worker, sendfile, one folder, no log.

The benchmark is skipped where nginx is not installed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START_S = 10.0
_CONFIG = """
daemon off;
worker_processes 1;
pid {work}/nginx.pid;
error_log {work}/error.log;
{user}
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_body_temp_path {work};
    proxy_temp_path {work};
    fastcgi_temp_path {work};
    uwsgi_temp_path {work};
    scgi_temp_path {work};
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def program() -> str | None:
    """Path of nginx; None if it is not installed. Debian installs it in a folder that only root's PATH has."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")


@contextmanager
def serving(nginx: str, root: Path, work: Path) -> Iterator[str]:
    """The address of an nginx that serves the files under `root`.

    Args:
        nginx: the program.
        root: folder to serve.
        work: an existing folder for nginx's own files.
    """
    port = _free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # its default user could not enter a temporary folder
    config = work / "nginx.conf"
    config.write_text(_CONFIG.format(work=work, user=user, port=port, root=root))
    process = subprocess.Popen([nginx, "-c", str(config), "-e", str(work / "start.log")])
    try:
        _wait_until_up(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise OSError(f"nginx does not listen on port {port} after {_START_S:g} s")
