"""The settings of a client: one field for each argument of `EmaClient`, with its check and its variable.

Everything is validated here, before a connection is opened.
"""

from __future__ import annotations

import logging
import math
import operator
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex, get_args

from ema_proto.averages.rules import AverageSpec
from ema_proto.averages.specs import parse_averages, split_averages
from ema_proto.averages.step_units import StepUnits, check_step_units
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import STEP_MAX
from ema_proto.names import check_name, check_patterns
from ema_proto.variables import misspelt
from ema_proto.wire.messages import Resume
from trainer_client.companions import CompanionFile, config_text, read_companions
from trainer_client.errors import SettingsError

log = logging.getLogger("ema")

_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+(?:%[^\s\]/%]+)?\]|[^\s:/*\[\]]+):(?P<port>\d{1,5})|ipc://\S+")
_EXAMPLE = "for example tcp://127.0.0.1:5555"
_INCARNATION_MAX = (1 << 63) - 1
_STEM_CHARS = 40


class WhenBehind(StrEnum):
    """What to do when a snapshot is due and no slot is free."""

    SKIP = "skip"
    WAIT = "wait"


class OnChange(StrEnum):
    """What to do when the tensors of the model are no longer those that the run was joined with."""

    STOP = "stop"
    RAISE = "raise"
    RESTART = "restart"


class Lane(StrEnum):
    """How snapshots reach the server: through shared memory, in chunks through its socket, or as is possible."""

    AUTO = "auto"
    SHM = "shm"
    ZMQ = "zmq"


def check_step(name: str, value: SupportsIndex, low: int) -> int:
    """Return `value` as an int in [low, the protocol's highest step).

    Raises:
        SettingsError: it is not a whole number, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise SettingsError(f"{name}={value!r} is not a whole number") from None
    if not low <= number < STEP_MAX:
        raise SettingsError(f"{name}={number} is not between {low} and {STEP_MAX - 1}")
    return number


def check_timeout(name: str, value: object) -> float:
    """Return `value` as seconds, finite and not negative.

    Raises:
        SettingsError: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise SettingsError(f"{name}={value!r} is not a number of seconds, 0 or more")
    return float(value)


def check_state(state: object) -> tuple[str, int]:
    """Return run and step of what `EmaClient.state_dict()` gave.

    Raises:
        SettingsError: it is something else.
    """
    if not isinstance(state, Mapping) or "run" not in state or "step" not in state:
        raise SettingsError(f"{str(state)[:80]!r} is not what state_dict() returns: a dict with 'run' and 'step'")
    run = _run("run", state["run"])
    if run is None:
        raise SettingsError("'run' in the state is None: load what state_dict() returned")
    return run, check_step("step", state["step"], 0)


def _endpoint(_: str, endpoint: object) -> str:
    if endpoint is None:
        raise SettingsError(f"no server address: pass endpoint, {_EXAMPLE}, or set EMA_ENDPOINT")
    match = _ADDRESS.fullmatch(str(endpoint))
    if match is None:
        hint = "; http is the readers' address" if str(endpoint).startswith("http") else ""
        raise SettingsError(
            f"endpoint {endpoint!r} is not the address of a server: use tcp://HOST:PORT, {_EXAMPLE}{hint}"
        )
    if match["port"] is not None and not 0 < int(match["port"]) < 1 << 16:
        raise SettingsError(f"endpoint {endpoint!r} has port {match['port']}: use the one that the server printed")
    return match[0]


def _run(name: str, run: object) -> str | None:
    if run is None:
        return None
    if not isinstance(run, str):
        raise SettingsError(f"{name}={run!r} is not a name")
    try:
        return check_name("run", run)
    except LocalProtocolError as error:
        raise SettingsError(str(error)) from None


def _token(_: str, token: str | None) -> str | None:
    # A token that is read from a file often ends in a line end, which the server would only report as a wrong token.
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise SettingsError(
            "the token (EMA_TOKEN) is not printable ASCII without spaces: use the server's, with no line end"
        )
    return token


def _generated_run() -> str:
    script = re.sub(r"[^A-Za-z0-9]+", "-", Path(sys.argv[0]).stem if sys.argv else "").strip("-")
    started = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{script[:_STEM_CHARS].strip('-') or 'run'}-{started}-{secrets.token_hex(2)}"


def _averages(name: str, given: object) -> tuple[AverageSpec, ...]:
    # One string may hold several, as environment variables and command lines do.
    items = split_averages(given) if isinstance(given, str) else given
    if not isinstance(items, Iterable) or isinstance(items, Mapping):
        raise SettingsError(f"{name}={given!r} is not a list of averages: use for example ['ema:0.9999', 'raw']")
    averages: list[AverageSpec | str] = []
    for item in items:
        if not isinstance(item, AverageSpec | str):
            raise SettingsError(f"{item!r} is not an average: use for example 'ema:0.9999', Ema(0.9999) or 'raw'")
        averages.append(item)
    try:
        return parse_averages(averages)
    except LocalProtocolError as error:
        raise SettingsError(str(error)) from None


def _step_unit(name: str, value: float | str | None) -> float | None:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise SettingsError(f"{name}={value!r} is not a number: use for example {name}=256") from None
    return value


def _patterns(name: str, given: Iterable[str] | str) -> tuple[str, ...]:
    try:
        return check_patterns(name, given if isinstance(given, str) else list(given))
    except (LocalProtocolError, TypeError) as error:
        raise SettingsError(f"{name}={str(given)[:80]!r} cannot be used: {error}") from None


def _choice(name: str, value: object, *, allowed: tuple[str, ...]) -> str:
    for each in allowed:
        if value == each:
            return each
    raise SettingsError(f"{name}={value!r} is unknown: use one of {', '.join(allowed)}")


def _lane(name: str, value: object) -> str:
    return Lane.AUTO if value is None else _choice(name, value, allowed=tuple(Lane))


def _config(_: str, config: Mapping[str, Any] | str | PathLike[str] | None) -> str | None:
    return None if config is None else config_text(config)


def _files(name: str, given: object) -> tuple[Path, ...] | None:
    if given is None:
        return None
    items = [given] if isinstance(given, str | PathLike) else given
    if isinstance(items, Mapping | bytes) or not isinstance(items, Iterable):
        raise SettingsError(f"{name}={given!r} is not a list of paths: pass files, a folder, or a list of both")
    paths = []
    for item in items:
        if not isinstance(item, str | PathLike):
            raise SettingsError(f"{name} has {item!r}, which is not a path")
        paths.append(Path(item))
    return tuple(paths)


def _incarnation(name: str, value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _INCARNATION_MAX:
        raise SettingsError(f"{name}={value!r} is not a whole number from 0 to 2**63 - 1")
    return value


def _setting(check: Callable[[str, Any], Any], variable: str = "") -> Mapping[str, Any]:
    """The metadata of a setting.

    Args:
        check: returns the canonical value of what was given under a name, the argument's or the variable's.
        variable: stands in for an argument that is None.
    """
    return {"check": check, "variable": variable}


@dataclass(frozen=True, slots=True)
class Settings:
    """The validated arguments of one client; build with `Settings.of`."""

    endpoint: str = field(metadata=_setting(_endpoint, "EMA_ENDPOINT"))
    run: str = field(metadata=_setting(_run, "EMA_RUN"))
    averages: tuple[AverageSpec, ...] = field(metadata=_setting(_averages))
    samples_per_step: float | None = field(metadata=_setting(_step_unit, "EMA_SAMPLES_PER_STEP"))
    steps_per_epoch: float | None = field(metadata=_setting(_step_unit, "EMA_STEPS_PER_EPOCH"))
    include: tuple[str, ...] = field(metadata=_setting(_patterns))
    exclude: tuple[str, ...] = field(metadata=_setting(_patterns))
    trainable_only: bool = field(metadata=_setting(lambda _, value: bool(value)))
    step: int | None = field(metadata=_setting(lambda name, step: None if step is None else check_step(name, step, 0)))
    every: int = field(metadata=_setting(partial(check_step, low=1)))
    publish_every_steps: int | None = field(
        metadata=_setting(lambda name, steps: None if steps is None else check_step(name, steps, 1))
    )
    when_behind: WhenBehind = field(metadata=_setting(partial(_choice, allowed=tuple(WhenBehind))))
    on_change: OnChange = field(metadata=_setting(partial(_choice, allowed=tuple(OnChange))))
    resume: Resume = field(metadata=_setting(partial(_choice, allowed=get_args(Resume))))
    token: str | None = field(repr=False, metadata=_setting(_token, "EMA_TOKEN"))
    config: str | None = field(repr=False, metadata=_setting(_config))
    files: tuple[Path, ...] | None = field(metadata=_setting(_files))
    checksum: bool = field(metadata=_setting(lambda _, value: bool(value)))
    connect_timeout_s: float = field(metadata=_setting(check_timeout))
    wait_timeout_s: float = field(metadata=_setting(check_timeout))
    overlap: bool = field(metadata=_setting(lambda _, value: bool(value)))
    lane: Lane = field(metadata=_setting(_lane, "EMA_LANE"))
    incarnation: int = field(metadata=_setting(_incarnation, "TORCHELASTIC_RESTART_COUNT"))
    rank: int | None = field(metadata=_setting(lambda name, rank: None if rank is None else check_step(name, rank, 0)))
    run_generated: bool
    companions: tuple[CompanionFile, ...] | None = field(default=None, repr=False)  # what `files` hold, once it is read

    @property
    def step_units(self) -> StepUnits:
        """What a step is in samples and epochs."""
        return StepUnits(self.samples_per_step, self.steps_per_epoch)

    def with_files(self) -> Settings:
        """These settings with the files read, and a `config.json` among them as `config` unless that is given.

        Raises:
            SettingsError: a file cannot be used.
        """
        if self.files is None:
            return self
        read = read_companions(self.files, self.config)
        return replace(self, companions=read.files, config=read.config)

    @classmethod
    def of(cls, environ: Mapping[str, str], arguments: Mapping[str, Any]) -> Settings:
        """Validate `EmaClient`'s arguments; where one is None, its variable in `environ` stands in.

        A variable that looks like a misspelt one of ours is reported in a warning.

        Raises:
            SettingsError: a value cannot be used; the text names it and what to do.
        """
        for warning in misspelt(environ, variables()):
            log.warning("ema: %s", warning)
        values: dict[str, Any] = {}
        for each in _declared():
            name, value = each.name, arguments[each.name]
            text = environ.get(each.metadata["variable"])
            if value is None and text:  # set but empty is how compose files and shell scripts say "not set"
                name, value = each.metadata["variable"], text
            values[each.name] = each.metadata["check"](name, value)
        generated = values["run"] is None
        if generated:
            values["run"] = _generated_run()
        settings = cls(**values, run_generated=generated)
        try:
            check_step_units(settings.averages, settings.step_units)
        except LocalProtocolError as error:
            raise SettingsError(str(error)) from None
        return settings


def variables() -> frozenset[str]:
    """The names of all variables that stand in for arguments."""
    return frozenset(each.metadata["variable"] for each in _declared() if each.metadata["variable"])


def _declared() -> list[Field[Any]]:
    return [each for each in fields(Settings) if each.metadata]
