"""The command `ema serve`: its options are the fields of `ServerConfig`, each also an `EMA_*` variable.

Logs go to stderr, one JSON line to stdout. Exit codes: 0 stopped and everything published, 1 it could not start or not
publish, 2 a setting is wrong.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from ema_server.config import ServerConfig, Setting, option_of, setting_types, variable_of

# Receiving releases the interpreter lock dozens of times for each snapshot, and each time waits this long for a thread
# that reads the JOIN or lays out the files of 100,000 tensors. Python's default is 0.005.
_SWITCH_S = 0.0005

EXIT_FAILURE = 1
EXIT_USAGE = 2


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(**settings: Any) -> None:
    """Run the server: average what trainers stream, and serve the versions over HTTP.

    When it is ready it prints one line of JSON: zmq, http, data, device, pid.
    """
    try:
        config = ServerConfig(**settings)
    except ValueError as error:
        typer.echo(f"ema serve: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    _log_to_stderr(logging.getLevelNamesMapping()[config.log_level.upper()])
    sys.setswitchinterval(_SWITCH_S)
    raise typer.Exit(_run(config))


def _parameter(setting: Field[Any]) -> Parameter:
    """The field as typer reads it from a function's signature."""
    described: Setting = setting.metadata["setting"]
    kind = setting_types()[setting.name]
    option = typer.Option(
        option_of(setting.name),
        envvar=variable_of(setting.name),
        help=described.text,
        metavar=described.metavar,
        case_sensitive=False,
    )
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=setting.default, annotation=Annotated[kind, option])


serve.__signature__ = Signature([_parameter(each) for each in fields(ServerConfig)])  # type: ignore[attr-defined]


def _run(config: ServerConfig) -> int:
    # Imported only now: torch takes a second, which `ema --help` need not.
    from ema_server.compute.cuda import DeviceError
    from ema_server.compute.select import KernelUnavailableError
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


def _log_to_stderr(level: int) -> None:
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, stream=sys.stderr, format=form)
    logging.getLogger("uvicorn").setLevel(max(level, logging.WARNING))  # it announces signals that are not its own
