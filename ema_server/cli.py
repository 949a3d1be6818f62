"""The command `ema serve`: options and `EMA_*` variables to a `ServerConfig`, logs to stderr, one JSON line on stdout.

Exit codes: 0 stopped and everything published, 1 it could not start or not publish, 2 a setting is wrong.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from ema_server.config import RingDtype, ServerConfig

EXIT_FAILURE = 1
EXIT_USAGE = 2
_LEVELS = ("debug", "info", "warning", "error")


def _option(name: str, help_text: str, metavar: str | None = None) -> typer.models.OptionInfo:
    """An option that is also a variable: `--keep-generations` is `EMA_KEEP_GENERATIONS`."""
    found: typer.models.OptionInfo = typer.Option(
        f"--{name}", envvar=f"EMA_{name.upper().replace('-', '_')}", help=help_text, metavar=metavar
    )
    return found


# Numbers are taken as text: what is wrong with one is then said in one line, the same for an option and a variable.
Zmq = Annotated[str, _option("zmq", "Where trainers connect; port 0 takes a free one.", "ENDPOINT")]
Http = Annotated[str, _option("http", "Where readers connect; port 0 takes a free one.", "HOST:PORT")]
Data = Annotated[Path, _option("data", "Folder of the runs and metrics; made if it is missing.", "DIR")]
Token = Annotated[str | None, _option("token", "Secret that trainers and readers must know.", "TOKEN")]
Insecure = Annotated[bool, _option("insecure", "Allow other machines to connect without a token.")]
EverySeconds = Annotated[str, _option("publish-every-seconds", "Publish at least so often; 0: never.", "SECONDS")]
EverySteps = Annotated[str, _option("publish-every-steps", "Publish every so many steps; 0: never.", "STEPS")]
Keep = Annotated[
    str, _option("keep-generations", "How many newest generations of a run stay, and older ones.", "COUNT")
]
RingSize = Annotated[str, _option("ring-size", "Snapshots of power averages kept for synthesis; 0: none.", "COUNT")]
RingEvery = Annotated[str, _option("ring-every-steps", "Steps between two of them; 0: every generation.", "STEPS")]
RingKind = Annotated[str, _option("ring-dtype", "Their dtype: float32 or bfloat16.", "DTYPE")]
LostAfter = Annotated[str, _option("lost-after-seconds", "When a silent trainer counts as lost.", "SECONDS")]
ChunkBytes = Annotated[str, _option("chunk-bytes", "Size of the chunks that trainers send.", "BYTES")]
Device = Annotated[str, _option("device", "Where averages are kept: cpu, cuda, cuda:1, ...", "DEVICE")]
KernelName = Annotated[str, _option("kernel", "What averages are computed with: auto, torch or compiled.", "KERNEL")]
Evaluate = Annotated[
    str | None, _option("evaluate", "Evaluate versions by this function, in a process of its own.", "MODULE:FUNCTION")
]
EvaluateDevice = Annotated[str, _option("evaluate-device", "Where it gets the weights: cpu, cuda:0, ...", "DEVICE")]
EvaluateEvery = Annotated[str, _option("evaluate-every-versions", "Evaluate every so many versions.", "COUNT")]
LogLevel = Annotated[str, _option("log-level", f"One of {', '.join(_LEVELS)}.", "LEVEL")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(serve)


def serve(
    zmq: Zmq = "tcp://127.0.0.1:5555",
    http: Http = "127.0.0.1:8080",
    data: Data = Path("ema-data"),
    token: Token = None,
    insecure: Insecure = False,
    publish_every_seconds: EverySeconds = "300",
    publish_every_steps: EverySteps = "0",
    keep_generations: Keep = "3",
    ring_size: RingSize = "32",
    ring_every_steps: RingEvery = "0",
    ring_dtype: RingKind = "float32",
    lost_after_seconds: LostAfter = "60",
    chunk_bytes: ChunkBytes = "4194304",
    device: Device = "cpu",
    kernel: KernelName = "auto",
    evaluate: Evaluate = None,
    evaluate_device: EvaluateDevice = "cpu",
    evaluate_every_versions: EvaluateEvery = "1",
    log_level: LogLevel = "info",
) -> None:
    """Keep the averages of all runs, and serve their versions.

    When it is ready it prints one line of JSON: zmq, http, data, device, pid.
    """
    try:
        level = _level(log_level)
        config = ServerConfig(
            data=data,
            zmq=zmq,
            http=http,
            token=token,
            insecure=insecure,
            publish_every_seconds=_number("publish_every_seconds", publish_every_seconds),
            publish_every_steps=_whole("publish_every_steps", publish_every_steps),
            keep_generations=_whole("keep_generations", keep_generations),
            ring_size=_whole("ring_size", ring_size),
            ring_every_steps=_whole("ring_every_steps", ring_every_steps),
            ring_dtype=cast(RingDtype, ring_dtype),  # the config refuses what is none
            lost_after_seconds=_number("lost_after_seconds", lost_after_seconds),
            chunk_bytes=_whole("chunk_bytes", chunk_bytes),
            device=device,
            kernel=kernel,
            evaluate=evaluate,
            evaluate_device=evaluate_device,
            evaluate_every_versions=_whole("evaluate_every_versions", evaluate_every_versions),
        )
    except ValueError as error:
        typer.echo(f"ema serve: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    _log_to_stderr(level)
    raise typer.Exit(_run(config))


def _run(config: ServerConfig) -> int:
    # Imported only now: torch takes a second, which `ema --help` need not.
    from ema_server.compute.cuda import DeviceError
    from ema_server.compute.kernel_choice import KernelUnavailableError
    from ema_server.evaluation.metric_store import MetricStoreError
    from ema_server.http.listener import HttpListenError
    from ema_server.server import run
    from ema_server.storage.datadir import DataDirError
    from ema_server.storage.disk import allow_open_files

    allow_open_files()
    try:
        durable = run(config, lambda ready: print(ready.line(), flush=True))
    except (DeviceError, KernelUnavailableError) as error:
        typer.echo(f"ema serve: {error}", err=True)
        return EXIT_USAGE
    except (DataDirError, MetricStoreError, HttpListenError) as error:
        typer.echo(f"ema serve: {error}", err=True)
        return EXIT_FAILURE
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        typer.echo(f"ema serve: {place}{error.strerror or error}", err=True)
        return EXIT_FAILURE
    return 0 if durable else EXIT_FAILURE


def _number(setting: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{setting} is {text!r}: use a number") from None


def _whole(setting: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{setting} is {text!r}: use a whole number") from None


def _level(name: str) -> int:
    if name.lower() not in _LEVELS:
        raise ValueError(f"log_level is {name!r}: use one of {', '.join(_LEVELS)}")
    return logging.getLevelNamesMapping()[name.upper()]


def _log_to_stderr(level: int) -> None:
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, stream=sys.stderr, format=form)
    logging.getLogger("uvicorn").setLevel(max(level, logging.WARNING))  # it announces signals that are not its own
