"""Everything that a client can be told, validated before anything is opened.

Comes in: the constructor's arguments and an environment. Goes out: one frozen `Settings`. Knows no model and no socket.
"""

from __future__ import annotations

import json
import logging
import math
import operator
import re
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast, get_args

from ema_proto.averages.specs import AverageSpec, parse_averages, split_averages
from ema_proto.averages.step_units import StepUnits, check_step_units
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import CONFIG_BYTES_MAX, STEP_MAX
from ema_proto.names import check_name
from ema_proto.patterns import check_patterns
from ema_proto.variables import misspelt, warning
from ema_proto.wire.messages import Resume
from trainer_client.errors import SettingsError

log = logging.getLogger("ema")

_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/*\[\]]+):(?P<port>\d{1,5})|ipc://\S+")
_EXAMPLE = "for example tcp://127.0.0.1:5555"
_INCARNATION_MAX = (1 << 63) - 1
_STEM_CHARS = 40


class WhenBehind(StrEnum):
    """What to do when a snapshot is due and every slot is still on its way."""

    SKIP = "skip"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Settings:
    """One client's settings; build with `Settings.of`."""

    endpoint: str
    run: str
    run_generated: bool
    averages: tuple[AverageSpec, ...]
    step_units: StepUnits
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    trainable_only: bool
    step: int | None
    every: int
    when_behind: WhenBehind
    resume: Resume
    token: str | None = field(repr=False)
    config: str | None = field(repr=False)
    checksum: bool
    connect_timeout_s: float
    wait_timeout_s: float
    overlap: bool
    incarnation: int

    @classmethod
    def of(
        cls,
        environ: Mapping[str, str],
        *,
        endpoint: str | None,
        run: str | None,
        averages: Iterable[AverageSpec | str],
        samples_per_step: float | None,
        steps_per_epoch: float | None,
        include: Iterable[str] | str,
        exclude: Iterable[str] | str,
        trainable_only: bool,
        step: int | None,
        every: int,
        when_behind: Literal["skip", "wait"],
        resume: Resume,
        token: str | None,
        config: Mapping[str, Any] | str | PathLike[str] | None,
        checksum: bool,
        connect_timeout_s: float,
        wait_timeout_s: float,
        overlap: bool,
        incarnation: int | None,
    ) -> Settings:
        """Validate the arguments. Variables of an argument's name, as `EMA_RUN`, stand in for those that are None.

        A variable that looks like one of ours misspelt is named in a warning.

        Raises:
            SettingsError: one of them has a value that cannot be used; the text names it and what to do.
        """
        for name, meant in misspelt(environ):
            log.warning("ema: %s", warning(name, meant))
        named = _given(run, environ, "EMA_RUN")
        rules = _averages(averages)
        return cls(
            endpoint=_endpoint(_given(endpoint, environ, "EMA_ENDPOINT")),
            run=_generated_run() if named is None else _run(named),
            run_generated=named is None,
            averages=rules,
            step_units=_step_units(
                rules,
                _number(samples_per_step, environ, "EMA_SAMPLES_PER_STEP"),
                _number(steps_per_epoch, environ, "EMA_STEPS_PER_EPOCH"),
            ),
            include=_patterns("include", include),
            exclude=_patterns("exclude", exclude),
            trainable_only=bool(trainable_only),
            step=None if step is None else check_step("step", step, 0),
            every=check_step("every", every, 1),
            when_behind=WhenBehind(_choice("when_behind", when_behind, tuple(WhenBehind))),
            resume=cast(Resume, _choice("resume", resume, get_args(Resume))),
            token=_token(_given(token, environ, "EMA_TOKEN")),
            config=None if config is None else _config(config),
            checksum=bool(checksum),
            connect_timeout_s=check_timeout("connect_timeout_s", connect_timeout_s),
            wait_timeout_s=check_timeout("wait_timeout_s", wait_timeout_s),
            overlap=bool(overlap),
            incarnation=_incarnation(incarnation, environ),
        )


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
    return _run(state["run"]), check_step("step", state["step"], 0)


def _given(value: str | None, environ: Mapping[str, str], variable: str) -> str | None:
    if value is not None:
        return value
    # Set but empty is how compose files and shell scripts say "not set".
    return environ.get(variable) or None


def _endpoint(endpoint: object) -> str:
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


def _run(run: object) -> str:
    if not isinstance(run, str):
        raise SettingsError(f"run={run!r} is not a name")
    try:
        return check_name("run", run)
    except LocalProtocolError as error:
        raise SettingsError(str(error)) from None


def _token(token: str | None) -> str | None:
    # A line end comes along when a token is read from a file; in a proof it would only be called wrong.
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise SettingsError(
            "the token (EMA_TOKEN) holds a space, a line end or more than ASCII: no server has such a one"
        )
    return token


def _generated_run() -> str:
    script = re.sub(r"[^A-Za-z0-9]+", "-", Path(sys.argv[0]).stem if sys.argv else "").strip("-")
    started = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{script[:_STEM_CHARS].strip('-') or 'run'}-{started}-{secrets.token_hex(2)}"


def _averages(given: object) -> tuple[AverageSpec, ...]:
    # One string may hold several, as environment variables and command lines do.
    items = split_averages(given) if isinstance(given, str) else given
    if not isinstance(items, Iterable) or isinstance(items, Mapping):
        raise SettingsError(f"averages={given!r} is not a list of averages: use for example ['ema:0.9999', 'raw']")
    averages: list[AverageSpec | str] = []
    for item in items:
        if not isinstance(item, AverageSpec | str):
            raise SettingsError(f"{item!r} is not an average: use for example 'ema:0.9999', Ema(0.9999) or 'raw'")
        averages.append(item)
    try:
        return parse_averages(averages)
    except LocalProtocolError as error:
        raise SettingsError(str(error)) from None


def _number(value: float | None, environ: Mapping[str, str], variable: str) -> float | None:
    text = environ.get(variable)
    if value is not None or not text:
        return value
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"{variable}={text!r} is not a number: use for example {variable}=256") from None


def _step_units(
    rules: tuple[AverageSpec, ...], samples_per_step: float | None, steps_per_epoch: float | None
) -> StepUnits:
    try:
        units = StepUnits(samples_per_step, steps_per_epoch)
        check_step_units(rules, units)
    except LocalProtocolError as error:
        raise SettingsError(str(error)) from None
    return units


def _patterns(name: str, given: Iterable[str] | str) -> tuple[str, ...]:
    try:
        return check_patterns(name, given if isinstance(given, str) else list(given))
    except (LocalProtocolError, TypeError) as error:
        raise SettingsError(f"{name}={str(given)[:80]!r} cannot be used: {error}") from None


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise SettingsError(f"{name}={value!r} is unknown: use one of {', '.join(allowed)}")
    return value


def _config(config: Mapping[str, Any] | str | PathLike[str]) -> str:
    try:
        if isinstance(config, Mapping):
            text = json.dumps(dict(config), indent=2, allow_nan=False) + "\n"
        else:
            text = Path(config).read_bytes().decode()  # byte for byte: read_text would change line ends
        value = json.loads(text)
    except OSError as error:
        raise SettingsError(f"config file {str(config)!r} cannot be read: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"config is not JSON: {error}; pass a dict of plain values or the path of a JSON file"
        ) from None
    if not isinstance(value, dict):
        raise SettingsError("config is not a JSON object: pass a dict, or the path of a file that holds one")
    if len(text.encode()) > CONFIG_BYTES_MAX:
        raise SettingsError(f"config has {len(text.encode())} bytes, over the limit of {CONFIG_BYTES_MAX}")
    return text


def _incarnation(given: object, environ: Mapping[str, str]) -> int:
    restarts = environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    if given is None and not restarts.isdecimal():
        raise SettingsError(f"TORCHELASTIC_RESTART_COUNT={restarts!r} is not a count: pass incarnation= instead")
    value = int(restarts) if given is None else given
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _INCARNATION_MAX:
        raise SettingsError(f"incarnation={value!r} is not a whole number from 0 to 2**63 - 1")
    return value
