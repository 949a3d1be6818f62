"""What `ema doctor` looks at: one function for each check. Comes in: addresses and a folder; goes out: `Check` values.

A check never raises: what it cannot find out is a note. Nothing here is changed on the machine but for one probe file.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ema_server.storage.disk import probe_write

_GIB = 1 << 30
_FREE_DISK_GIB = 1.0  # a generation of a small model with a few averages
_NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph", "lustre")
_PACKAGES = {
    "torch": "the build made for this machine; a trainer and a server need it",
    "pyzmq": "pip install 'ema-sidecar[trainer]'; a trainer and a server need it",
    "safetensors": "pip install 'ema-sidecar[reader]'; a reader and a server need it",
    "httpx2": "pip install 'ema-sidecar[reader]'; a reader needs it",
    "fastapi": "pip install 'ema-sidecar[server]'; a server needs it",
    "uvicorn": "pip install 'ema-sidecar[server]'; a server needs it",
    "numba": "pip install 'ema-sidecar[fast]'; a server averages faster with it, and to the same bits without",
}


class State(StrEnum):
    """How a check came out: a `problem` keeps something from working, a `note` is worth knowing."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: what was looked at, how it is, and what to do about it (empty when all is well)."""

    name: str
    state: State
    found: str
    advice: str = ""


def versions() -> Iterator[Check]:
    """Python, this project, and the packages of its extras."""
    old = sys.version_info < (3, 11)
    advice = "use Python 3.11 or newer" if old else ""
    yield Check("python", State.PROBLEM if old else State.OK, platform.python_version(), advice)
    yield Check("ema-sidecar", State.OK, version("ema-sidecar"))
    for package, need in _PACKAGES.items():
        try:
            yield Check(package, State.OK, version(package))
        except PackageNotFoundError:
            yield Check(package, State.NOTE, "not installed", need)


def zmq_address(endpoint: str, server_answers: bool) -> Check:
    """Whether a server could listen at `endpoint` for trainers."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc" and address:
        return Check("zmq address", State.NOTE, f"{endpoint}: only tcp addresses are tried")
    if scheme != "tcp":
        found = f"{endpoint!r} is not tcp://HOST:PORT or ipc://PATH"
        return Check("zmq address", State.PROBLEM, found, "choose another with --zmq")
    return _address("zmq address", address, "--zmq", server_answers)


def http_address(address: str, server_answers: bool) -> Check:
    """Whether a server could listen at `address` for readers."""
    return _address("http address", address, "--http", server_answers)


def answers(address: str) -> bool:
    """Whether an ema server answers at the HTTP address, `HOST:PORT`."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{address}/healthz", timeout=2) as response:
            return bool(response.status == 200 and isinstance(json.load(response), dict))
    except (OSError, ValueError, urllib.error.URLError):
        return False


def _address(name: str, address: str, option: str, server_answers: bool) -> Check:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        return Check(name, State.PROBLEM, f"{address!r} is not HOST:PORT", f"choose another with {option}")
    try:
        if int(port) > 65535:  # getaddrinfo would wrap it around
            raise ValueError(f"port {port} is over 65535")
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed port may linger
            probe.bind(where)
    except (OSError, ValueError, OverflowError) as error:
        if server_answers:
            return Check(name, State.OK, f"{address} is taken: an ema server is running")
        return Check(name, State.PROBLEM, f"{address}: {error}", f"stop what listens there, or choose with {option}")
    return Check(name, State.OK, f"{address} is free")


def disk(folder: Path) -> Iterator[Check]:
    """Room, filesystem and durability of the data folder, or of the nearest folder above it that exists."""
    if folder.exists() and not folder.is_dir():
        yield Check("disk", State.PROBLEM, f"{folder} is no folder", "choose another with --data")
        return
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free_gib = shutil.disk_usage(place).free / _GIB
    short = free_gib < _FREE_DISK_GIB
    advice = "each generation holds every average once: make room, or choose another --data" if short else ""
    yield Check("disk", State.PROBLEM if short else State.OK, f"{free_gib:.1f} GiB free at {place}", advice)
    yield _filesystem(place)
    yield _durable_write(place)


def _filesystem(place: Path) -> Check:
    kind = _filesystem_type(place)
    if kind == "tmpfs":
        return Check("filesystem", State.NOTE, kind, "it is lost when the machine restarts: choose another --data")
    if kind in _NETWORK_FILESYSTEMS:
        return Check("filesystem", State.NOTE, kind, "locks and renames over a network may fail: prefer a local disk")
    return Check("filesystem", State.OK, kind)


def _filesystem_type(place: Path) -> str:
    """Type of the deepest mount that holds `place`."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    resolved = place.resolve()
    holding = [(len(mount[1]), mount[2]) for mount in mounts if resolved.is_relative_to(mount[1])]
    return max(holding, default=(0, "unknown"))[1]


def _durable_write(place: Path) -> Check:
    started = time.perf_counter()
    try:
        probe_write(place, 1 << 20)
    except OSError as error:
        return Check("durable write", State.PROBLEM, str(error), "choose a folder that can be written with --data")
    return Check("durable write", State.OK, f"1 MiB in {(time.perf_counter() - started) * 1000:.1f} ms")


def machine() -> Iterator[Check]:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cores", State.OK, str(cores))
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        yield Check("memory", State.NOTE, "unknown")
        return
    limit = _memory_limit()
    capped = f", of {limit / _GIB:.1f} GiB that this container may use" if limit is not None else ""
    yield Check("memory", State.OK, f"{available / _GIB:.1f} GiB available{capped}")


def _memory_limit() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def gpu() -> Check:
    """The CUDA devices that torch sees; none is no problem."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        return Check("gpu", State.NOTE, "unknown: torch is not installed")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", State.OK, ", ".join(names) or "none; the service needs none")


def zeromq() -> Check:
    """The library under pyzmq, and what it was built with."""
    try:
        zmq = importlib.import_module("zmq")
    except ModuleNotFoundError:
        return Check("libzmq", State.NOTE, "unknown: pyzmq is not installed")
    able = [name for name in ("ipc", "curve") if zmq.has(name)]
    return Check("libzmq", State.OK, f"{zmq.zmq_version()} with {', '.join(able) or 'neither ipc nor curve'}")
