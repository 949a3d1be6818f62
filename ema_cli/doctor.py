"""`ema doctor`: checks whether this machine can train, serve or read, or (with --url) whether a server works.

Each check is a function that returns `Check` values and never raises. Only one temporary file is written.
"""

from __future__ import annotations

import dataclasses
import importlib
import json as jsonlib
import os
import platform
import re
import shutil
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

import typer

from ema_cli.exits import EXIT_FAILURE
from ema_reader import Reader, ReaderError
from ema_reader.cli.render import size_text
from ema_server.config import split_host_port
from ema_server.storage.disk import probe_write

_FREE_DISK_BYTES = 1_000_000_000  # a generation of a small model with a few averages
_PROBE_BYTES = 1_000_000  # of the durable write
_NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph", "lustre")


class State(StrEnum):
    """Result of a check: a `problem` keeps something from working, a `note` is worth knowing."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of output; `advice` says what to do and is empty when all is well."""

    name: str
    state: State
    found: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    zmq: Annotated[str, typer.Option("--zmq", envvar="EMA_ZMQ", help="Address for trainers.")] = "tcp://127.0.0.1:5555",
    http: Annotated[str, typer.Option("--http", envvar="EMA_HTTP", help="Address for readers.")] = "127.0.0.1:8080",
    data: Annotated[Path, typer.Option("--data", envvar="EMA_DATA", help="The server's data folder.")] = Path(
        "ema-data"
    ),
    url: Annotated[str | None, typer.Option("--url", help="Check this server instead of this machine.")] = None,
    token: Annotated[str | None, typer.Option("--token", envvar="EMA_TOKEN", help="With --url: its token.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Check versions, addresses, disk, memory and GPU of this machine, or a server by its URL.

    Exit code 1 when a check finds a problem.
    """
    found = examine(zmq, http, data) if url is None else examine_server(url, token)
    healthy = all(check.state is not State.PROBLEM for check in found)
    if json:
        typer.echo(jsonlib.dumps({"ok": healthy, "checks": [dataclasses.asdict(check) for check in found]}))
    else:
        for check in found:
            advice = f" - {check.advice}" if check.advice else ""
            typer.echo(f"{check.state.value:7}  {check.name}: {check.found}{advice}")
    raise typer.Exit(0 if healthy else EXIT_FAILURE)


def examine(zmq: str, http: str, data: Path) -> tuple[Check, ...]:
    """All checks of this machine, in the order in which they are shown."""
    running = _is_ema_server(http)
    addresses = zmq_address(zmq, running), tcp_address("http", http, running)
    return (*versions(), zeromq(), *addresses, *disk(data), *memory(), gpu())


def examine_server(url: str, token: str | None) -> tuple[Check, ...]:
    """Whether a server answers, is ready check by check, and accepts the token."""
    own = (Check("ema-sidecar", State.OK, version("ema-sidecar")),)
    try:
        with Reader(url, token) as reader:
            ready, checks = reader.ready()
            answered = Check("server", State.OK if ready else State.PROBLEM, f"{url} is {'' if ready else 'not '}ready")
            each = [
                Check(name, State.OK if check.get("ok") else State.PROBLEM, str(check.get("detail")))
                for name, check in checks.items()
            ]
            return (*own, answered, *each, _accepted(reader))
    except ReaderError as error:
        return (*own, Check("server", State.PROBLEM, str(error)))


def _accepted(reader: Reader) -> Check:
    try:
        return Check("runs", State.OK, f"{len(reader.runs())} on this server")
    except ReaderError as error:
        return Check("runs", State.PROBLEM, str(error))


def versions() -> Iterator[Check]:
    """Python, this project, and what its extras require."""
    yield Check("python", State.OK, platform.python_version())
    yield Check("ema-sidecar", State.OK, version("ema-sidecar"))
    pairs = re.findall(r"^([\w.-]+).*extra == '(\w+)'", "\n".join(requires("ema-sidecar") or ()), re.MULTILINE)
    sizes = Counter(extra for _, extra in pairs)
    extras = {package: min((e for p, e in pairs if p == package), key=lambda e: sizes[e]) for package, _ in pairs}
    for package, extra in extras.items():
        advice = (
            "the build made for this machine"
            if package == "torch"
            else f"in a clone of ema-sidecar, pip install '.[{extra}]'"
        )
        try:
            yield Check(package, State.OK, version(package))
        except PackageNotFoundError:
            yield Check(package, State.NOTE, "not installed", f"if a command needs it: {advice}")


def zmq_address(endpoint: str, server_answers: bool) -> Check:
    """Whether a server can listen at `endpoint` for trainers."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc" and address:
        return Check("zmq address", State.NOTE, f"{endpoint}: only tcp addresses are tried")
    if scheme != "tcp":
        found = f"{endpoint!r} is not tcp://HOST:PORT or ipc://PATH"
        return Check("zmq address", State.PROBLEM, found, "choose another with --zmq")
    return tcp_address("zmq", address, server_answers)


def _is_ema_server(address: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{address}/healthz", timeout=2) as response:
            return isinstance(jsonlib.load(response), dict)
    except (OSError, ValueError):
        return False


def tcp_address(setting: str, address: str, server_answers: bool) -> Check:
    """Whether a server can listen at HOST:PORT, the value of the setting `zmq` or `http`."""
    name, advice = f"{setting} address", f"choose another with --{setting}"
    try:
        host, port = split_host_port(setting, address)
    except ValueError as error:
        return Check(name, State.PROBLEM, str(error), advice)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(place[:2], family=family).close()
    except OSError as error:
        if server_answers:
            return Check(name, State.OK, f"{address} is taken: an ema server is running")
        return Check(name, State.PROBLEM, f"{address}: {error.strerror}", f"stop what listens there, or {advice}")
    return Check(name, State.OK, f"{address} is free")


def disk(folder: Path) -> Iterator[Check]:
    """Free space, filesystem and a durable write in the data folder, or the nearest existing folder above it."""
    if folder.exists() and not folder.is_dir():
        yield Check("disk", State.PROBLEM, f"{folder} is not a folder", "choose another with --data")
        return
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    short = free < _FREE_DISK_BYTES
    advice = "each generation holds every average once: free some space, or choose another --data" if short else ""
    yield Check("disk", State.PROBLEM if short else State.OK, f"{size_text(free)} free at {place}", advice)
    yield _filesystem(place)
    yield _durable_write(place)


def _filesystem(place: Path) -> Check:
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        mounts = []
    holding = [(len(mount[1]), mount[2]) for mount in mounts if place.resolve().is_relative_to(mount[1])]
    kind = max(holding, default=(0, "unknown"))[1]  # the deepest mount
    if kind == "tmpfs":
        return Check("filesystem", State.NOTE, kind, "it is lost when the machine restarts: choose another --data")
    if kind in _NETWORK_FILESYSTEMS:
        return Check("filesystem", State.NOTE, kind, "locks and renames over a network may fail: prefer a local disk")
    return Check("filesystem", State.OK, kind)


def _durable_write(place: Path) -> Check:
    started = time.perf_counter()
    try:
        probe_write(place, _PROBE_BYTES)
    except OSError as error:
        return Check("durable write", State.PROBLEM, str(error), "choose a folder that can be written with --data")
    return Check(
        "durable write", State.OK, f"{size_text(_PROBE_BYTES)} in {(time.perf_counter() - started) * 1000:.1f} ms"
    )


def memory() -> Iterator[Check]:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cores", State.OK, str(cores))
    server_memory = _imported("ema_server.compute.memory")  # it imports torch
    available = None if server_memory is None else server_memory.available_bytes()
    if available is None:
        yield Check("memory", State.NOTE, "unknown")
    else:
        yield Check("memory", State.OK, f"{size_text(available)} available")


def gpu() -> Check:
    """The CUDA devices that torch sees; having none is no problem."""
    torch = _imported("torch")
    if torch is None:
        return Check("gpu", State.NOTE, "unknown: torch is not installed")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", State.OK, ", ".join(names) or "none; ema-sidecar needs none")


def zeromq() -> Check:
    """The library under pyzmq, and what it was built with."""
    zmq = _imported("zmq")
    if zmq is None:
        return Check("libzmq", State.NOTE, "unknown: pyzmq is not installed")
    return Check("libzmq", State.OK, f"{zmq.zmq_version()}, {'with' if zmq.has('ipc') else 'without'} ipc")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
