"""How fast curl downloads an average's file from our server, and from nginx with `sendfile`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from torch import nn

from benchmarks import nginx
from benchmarks.result import Row, Section, Spread, interleaved
from benchmarks.served import Server, serving
from ema_reader import Reader
from trainer_client import EmaClient

_SIDE = 16_384  # a square of float32: 1 GiB
_SIDE_QUICK = 512
_TITLE = "download: one file by curl, loopback"
_RIVAL = "nginx, `sendfile`"


def measure(*, quick: bool) -> Section:
    """A file of 1 GiB."""
    program = nginx.program()
    if program is None:
        return Section(_TITLE, _RIVAL, (), "**Skipped: there is no nginx here** (Debian: `apt install nginx-light`).")
    side = _SIDE_QUICK if quick else _SIDE
    with serving(2 * 4 * side * side) as server:
        url, file = _published(server, side)
        work = server.folder / "nginx"
        work.mkdir()
        with nginx.serving(program, file.parent, work) as rival:
            seconds = interleaved(
                2 if quick else 7, ours=lambda: _curl(url), rival=lambda: _curl(f"{rival}/{file.name}")
            )
        nbytes = file.stat().st_size
    rates = {arm: [nbytes / second / 1e9 for second in taken] for arm, taken in seconds.items()}
    row = Row(
        f"`model.safetensors`, {nbytes / 2**20:.0f} MiB",
        Spread.of(rates["ours"]).show("GB/s"),
        Spread.of(rates["rival"]).show("GB/s"),
        Spread.ratio(rates["ours"], rates["rival"]),
        "≥ 0.9",
    )
    return Section(_TITLE, _RIVAL, (row,))


def _published(server: Server, side: int) -> tuple[str, Path]:
    """The address and the path of a finished average's file."""
    model = nn.Linear(side, side, bias=False)
    with EmaClient(server.zmq, run="download", averages=["ema:0.9999"]) as client:
        client.update(model)
    with Reader(server.http) as reader:
        version = reader.versions("download", "ema-0.9999")[0]
    (file,) = server.data.rglob("model.safetensors")
    return f"{server.http}/v1/runs/download/averages/ema-0.9999/versions/{version.id}/files/{file.name}", file


def _curl(url: str) -> float:
    """Duration of a download in seconds."""
    command = ["curl", "-sSf", "-o", "/dev/null", "-w", "%{time_total}", url]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
