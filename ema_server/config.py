"""Settings of one server process: names, types, defaults, bounds and help texts, each written once.

`ema_server.cli` makes the options of `ema serve` and their `EMA_*` variables of the fields, and
`scripts/docs_reference.py` the documentation. Nothing is read from the environment or the disk here.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from ema_proto.limits import CHUNK_BYTES_DEFAULT, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, HEARTBEAT_S, SESSION_LOST_S

Kernel: TypeAlias = Literal["auto", "torch", "compiled"]
RingDtype: TypeAlias = Literal["float32", "bfloat16"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]

RING_SIZE_MIN = 2  # the first and the newest
RING_SIZE_MAX = 256  # more averages add nothing to the precision of a synthesized one

_TOKEN_CHARS_MAX = 256  # fits a request header


@dataclass(frozen=True, slots=True)
class Setting:
    """The metadata of a setting.

    Args:
        help: what it does.
        metavar: what stands for a value in the help; None where the choices do.
        low: lowest number.
        high: highest number, None without a limit.
        form: what a text must match, and how to say that.
    """

    help: str
    metavar: str | None = None
    low: int = 0
    high: int | None = None
    form: tuple[str, str] | None = None

    @property
    def range(self) -> str:
        """The numbers that are allowed."""
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"

    @property
    def text(self) -> str:
        """What it does and which numbers are allowed, for `ema serve --help` and the documentation."""
        return f"{self.help} Use {self.range}." if self.low else self.help

    def check(self, name: str, value: object, kind: object) -> None:
        """Refuse a value that is out of range, of another form, or none of a `Literal`'s.

        Raises:
            ValueError: the text names the setting, the value and what is allowed.
        """
        allowed = None
        choices = get_args(kind)
        if isinstance(value, int | float):
            if not math.isfinite(value) or not self.low <= value <= (math.inf if self.high is None else self.high):
                allowed = self.range
        elif self.form is not None and isinstance(value, str) and re.fullmatch(self.form[0], value) is None:
            allowed = self.form[1]
        elif choices and isinstance(choices[0], str) and value not in choices:
            allowed = f"one of {', '.join(choices)}"
        if allowed is not None:
            raise ValueError(f"{name} is {value!r}: use {allowed}")


def _setting(*args: Any, **options: Any) -> Mapping[str, Setting]:
    return {"setting": Setting(*args, **options)}


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How a server runs. The metadata of each field is its `Setting`, which documents and bounds it.

    Raises:
        ValueError: a value is out of range or the values contradict each other; the text says what to change.
    """

    data: Path = field(
        default=Path("ema-data"), metadata=_setting("Folder of the runs and metrics, created if missing.", "DIR")
    )
    zmq: str = field(
        default="tcp://127.0.0.1:5555",
        metadata=_setting("Address for trainers, tcp://HOST:PORT or ipc://PATH; port 0 takes a free port.", "ENDPOINT"),
    )
    http: str = field(
        default="127.0.0.1:8080", metadata=_setting("Address for readers; port 0 takes a free port.", "HOST:PORT")
    )
    token: str | None = field(
        default=None, repr=False, metadata=_setting("Secret that trainers and readers must present.", "TOKEN")
    )
    allowed_hosts: str = field(
        default="",
        metadata=_setting(
            "Names by which requests may address the server, separated by commas; *.DOMAIN: all below it, *: any. "
            "Default: with a token any; without one only addresses, names without a dot, and this machine's names, so "
            "that no web page can read under a name of its own.",
            "NAMES",
            form=(r"|\*|(\*\.)?[\w.-]+(,(\*\.)?[\w.-]+)*", "names such as ema.example.org,*.example.org, or *"),
        ),
    )
    hub_upstream: str | None = field(
        default=None,
        metadata=_setting(
            "Send clients of the Hugging Face Hub on to this Hub, with their token, for what is not a run here.",
            "URL",
            form=(r"https?://[^\s/?#@]+(/[^\s?#]*)?", "a URL such as https://huggingface.co"),
        ),
    )
    insecure: bool = field(default=False, metadata=_setting("Allow other machines to connect without a token."))
    publish_every_seconds: float = field(
        default=300.0, metadata=_setting("Publish each changed run at least this often; 0: no timer.", "SECONDS")
    )
    publish_every_steps: int = field(default=0, metadata=_setting("Publish a run every N steps; 0: off.", "N"))
    publish_min_seconds: float = field(
        default=10.0,
        metadata=_setting(
            "Shortest time between generations that a trainer asks for by its publish_every_steps; 0: no limit.",
            "SECONDS",
        ),
    )
    keep_generations: int = field(
        default=3,
        metadata=_setting(
            "How many of a run's newest generations to keep, and how many older ones, spread over the run.", "N", low=1
        ),
    )
    keep_short_runs: int = field(
        default=20,
        metadata=_setting(
            "Of the earlier runs of a name that ended after fewer than short-run-steps steps, how many to keep.",
            "N",
            low=1,
        ),
    )
    short_run_steps: int = field(
        default=100,
        metadata=_setting(
            "Delete the oldest earlier runs of a name that took fewer steps, beyond keep-short-runs; 0: none.", "N"
        ),
    )
    ring_size: int = field(
        default=32,
        metadata=_setting(
            "How many snapshots of a run's power averages to keep for synthesis (the ring); 0: none.",
            "N",
            high=RING_SIZE_MAX,
        ),
    )
    ring_every_steps: int = field(
        default=0,
        metadata=_setting(
            "Steps between the ring's snapshots, each of which is published; 0: one for each generation.", "N"
        ),
    )
    ring_dtype: RingDtype = field(
        default="float32",
        metadata=_setting(
            "Dtype of the ring's snapshots: float32 (hard links) or bfloat16 (half the bytes, less exact)."
        ),
    )
    lost_after_seconds: float = field(
        default=SESSION_LOST_S,
        metadata=_setting(
            "Time without a sign of life after which a trainer is lost, and its run is published and unloaded.",
            "SECONDS",
            low=int(2 * HEARTBEAT_S) + 1,  # a heartbeat may be late, or lost
        ),
    )
    chunk_bytes: int = field(
        default=CHUNK_BYTES_DEFAULT,
        metadata=_setting("Size of the chunks that trainers send.", "BYTES", low=CHUNK_BYTES_MIN, high=CHUNK_BYTES_MAX),
    )
    shm_folder: str = field(
        default="auto",
        metadata=_setting(
            "Folder of the socket by which trainers on this machine share memory; auto: one of this user, off: none.",
            "DIR",
        ),
    )
    shm_uids: str | None = field(
        default=None,
        metadata=_setting(
            "Ids of other users whose trainers may do so; the server's own user and root may.",
            "UIDS",
            form=(r"[0-9]{1,10}(,[0-9]{1,10})*", "user ids, for example 1000,1001"),
        ),
    )
    device: str = field(
        default="cpu",
        metadata=_setting(
            "Where averages are kept and computed: cpu, cuda or cuda:INDEX.",
            "DEVICE",
            form=(r"cpu|cuda(:[0-9]{1,4})?", "cpu, cuda, or cuda:0, cuda:1, ..."),
        ),
    )
    kernel: Kernel = field(
        default="auto",
        metadata=_setting("What computes the averages: torch, compiled (needs the extra fast), or the best of them."),
    )
    nice: str = field(
        default="auto",
        metadata=_setting(
            "Scheduling priority, 0 (normal) to 19 (lowest). auto: 10 where this process, by its affinity or its "
            "container's quota, has fewer than 4 CPUs, else 0.",
            "N",
            form=(r"auto|1?[0-9]", "auto, or 0 to 19"),
        ),
    )
    evaluate: str | None = field(
        default=None,
        metadata=_setting(
            "Evaluate versions with this function, in a process beside the server.",
            "MODULE:FUNCTION",
            form=(r"[^\W\d][\w.]*:[^\W\d][\w.]*", "module:function, for example my_evaluation:evaluate"),
        ),
    )
    evaluate_device: str = field(
        default="cpu",
        metadata=_setting(
            "Device on which that function gets the weights: cpu, cuda:0, ...",
            "DEVICE",
            form=(r"[a-z]+(:[0-9]+)?", "a device of torch, for example cpu or cuda:0"),
        ),
    )
    evaluate_every_versions: int = field(
        default=1, metadata=_setting("Evaluate every Nth version of an average, and always the last.", "N", low=1)
    )
    log_level: LogLevel = field(default="info", metadata=_setting("Lowest level of the log lines on stderr."))

    def __post_init__(self) -> None:
        """Check each value by its `Setting`, then the rules that a `Setting` cannot state."""
        for each in fields(self):
            each.metadata["setting"].check(each.name, getattr(self, each.name), setting_types()[each.name])
        if 0 < self.ring_size < RING_SIZE_MIN:
            raise ValueError(f"ring_size is {self.ring_size}: use 0 (no ring) or {RING_SIZE_MIN} to {RING_SIZE_MAX}")
        _check_token(self.token)
        for setting, host in (("zmq", _zmq_host(self.zmq)), ("http", self.http_host)):
            if host is not None and not _is_loopback(host) and self.token is None and not self.insecure:
                raise ValueError(
                    f"{setting} address {host!r} can be reached from other machines: set a token (EMA_TOKEN), "
                    "listen on 127.0.0.1, or say --insecure"
                )

    @property
    def http_host(self) -> str:
        """Host part of `http`, without brackets."""
        return split_host_port("http", self.http)[0]

    @property
    def http_port(self) -> int:
        """Port part of `http`; 0 means a free one."""
        return split_host_port("http", self.http)[1]


@cache
def setting_types() -> Mapping[str, Any]:
    """The types of `ServerConfig`'s fields by name."""
    return get_type_hints(ServerConfig)


def option_of(name: str) -> str:
    """The option of a field: `--keep-generations`."""
    return f"--{name.replace('_', '-')}"


def variable_of(name: str) -> str:
    """The variable of a field: `EMA_KEEP_GENERATIONS`."""
    return f"EMA_{name.upper()}"


def split_host_port(setting: str, address: str) -> tuple[str, int]:
    """Split `HOST:PORT` (an IPv6 host in brackets).

    Raises:
        ValueError: there is no host or the port is not a number from 0 to 65535.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{setting} address {address!r} is not HOST:PORT with a port from 0 (any free one) to 65535")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(f"{setting} address {address!r} has an IPv6 host without brackets: write [{host}]:{port}")
    return host, int(port)


def _zmq_host(endpoint: str) -> str | None:
    """Host of a tcp endpoint, None for one that only this machine can reach."""
    scheme, separator, rest = endpoint.partition("://")
    if scheme == "tcp" and separator:
        return split_host_port("zmq", rest)[0]
    if scheme == "ipc" and rest:
        return None
    raise ValueError(f"zmq endpoint {endpoint!r} is not tcp://HOST:PORT or ipc://PATH")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_token(token: str | None) -> None:
    if token is None:
        return
    if not 0 < len(token) <= _TOKEN_CHARS_MAX or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"the token (EMA_TOKEN) has {len(token)} characters or some that are not printable ASCII: "
            f"use 1 to {_TOKEN_CHARS_MAX} without spaces, or unset it"
        )
