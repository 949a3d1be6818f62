"""Settings of one server process. Comes in: plain values. Goes out: one frozen, validated `ServerConfig`.

Nothing is read from the environment or the disk here: the command line maps options and `EMA_*` variables to fields.
"""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from ema_proto.limits import CHUNK_BYTES_DEFAULT, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, HEARTBEAT_S, SESSION_LOST_S

KERNELS = ("auto", "torch", "compiled")

RingDtype: TypeAlias = Literal["float32", "bfloat16"]
RING_SIZE_MIN = 2  # the first and the newest
RING_SIZE_MAX = 256  # shares of more averages are not worth their solution

_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_DEVICE = re.compile(r"[a-z]+(:[0-9]+)?")
_KEPT_ON = re.compile(r"cpu|cuda(:[0-9]{1,4})?")
_LOST_AFTER_S_MIN = 2 * HEARTBEAT_S + 1  # a heartbeat may be late, or lost
_TOKEN_CHARS_MAX = 256  # a request header's worth, far above any key


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How a server runs.

    Args:
        data: folder that holds runs, generations and metrics.
        zmq: endpoint for trainers, `tcp://HOST:PORT` or `ipc://PATH`; port 0 takes a free one.
        http: `HOST:PORT` for readers; port 0 takes a free one.
        token: secret that trainers and readers must prove they know; None asks for none.
        insecure: allow an address other than loopback without a token.
        publish_every_seconds: a generation of every changed run at least this often; 0 switches the timer off.
        publish_every_steps: a generation every so many steps; 0 switches it off.
        keep_generations: how many of a run's newest generations stay on disk, and how many older ones at most.
        ring_size: how many snapshots of a run's power averages stay for later synthesis; 0: none.
        ring_every_steps: steps from one of them to the next, also a reason to publish; 0: one of every generation.
        ring_dtype: `float32` (hard links to the generations' files) or `bfloat16` (half the bytes, less exact).
        lost_after_seconds: a trainer silent for so long is lost; its run is published and leaves memory.
        chunk_bytes: size of the chunks asked from trainers.
        device: where averages are kept and computed, `cpu`, `cuda` or `cuda:INDEX`.
        kernel: what averages are computed with: `torch`, `compiled` (needs numba), or `auto`, the best there is.
        evaluate: `module:function` that the server's own evaluation worker calls; None: it has no worker.
        evaluate_device: where that worker loads weights to, `cpu`, `cuda:1`, ...
        evaluate_every_versions: of each average it takes every so-manieth version, and the last one.

    Raises:
        ValueError: a value is out of range or the values contradict each other; the text says what to change.
    """

    data: Path
    zmq: str = "tcp://127.0.0.1:5555"
    http: str = "127.0.0.1:8080"
    token: str | None = None
    insecure: bool = False
    publish_every_seconds: float = 300.0
    publish_every_steps: int = 0
    keep_generations: int = 3
    ring_size: int = 32
    ring_every_steps: int = 0
    ring_dtype: RingDtype = "float32"
    lost_after_seconds: float = SESSION_LOST_S
    chunk_bytes: int = CHUNK_BYTES_DEFAULT
    device: str = "cpu"
    kernel: str = "auto"
    evaluate: str | None = None
    evaluate_device: str = "cpu"
    evaluate_every_versions: int = 1

    def __post_init__(self) -> None:
        """Validate each value, then what holds between them."""
        _check_seconds("publish_every_seconds", self.publish_every_seconds, zero_is_off=True)
        _check_seconds("lost_after_seconds", self.lost_after_seconds, zero_is_off=False)
        if self.lost_after_seconds < _LOST_AFTER_S_MIN:
            raise ValueError(
                f"lost_after_seconds is {self.lost_after_seconds}: trainers show life every {HEARTBEAT_S:g} s, "
                f"use {_LOST_AFTER_S_MIN:g} or more"
            )
        if self.publish_every_steps < 0:
            raise ValueError(f"publish_every_steps is {self.publish_every_steps}: use 0 (off) or a number of steps")
        if self.keep_generations < 1:
            raise ValueError(f"keep_generations is {self.keep_generations}: a run needs at least 1 to resume from")
        _check_ring(self.ring_size, self.ring_every_steps, self.ring_dtype)
        if not CHUNK_BYTES_MIN <= self.chunk_bytes <= CHUNK_BYTES_MAX:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}: use {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}")
        if _KEPT_ON.fullmatch(self.device) is None:
            raise ValueError(f"device is {self.device!r}: averages can be kept on cpu, cuda, or cuda:0, cuda:1, ...")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {self.kernel!r}: use {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
        _check_evaluator(self.evaluate, self.evaluate_device, self.evaluate_every_versions)
        _check_token(self.token)
        for setting, host in (("zmq", _zmq_host(self.zmq)), ("http", split_host_port("http", self.http)[0])):
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


def _check_seconds(setting: str, value: float, *, zero_is_off: bool) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_is_off):
        allowed = "0 (off) or a positive number" if zero_is_off else "a positive number"
        raise ValueError(f"{setting} is {value!r}: use {allowed} of seconds")


def _check_ring(size: int, every_steps: int, dtype: str) -> None:
    if size != 0 and not RING_SIZE_MIN <= size <= RING_SIZE_MAX:
        raise ValueError(f"ring_size is {size}: use 0 (no ring) or {RING_SIZE_MIN} to {RING_SIZE_MAX}")
    if every_steps < 0:
        raise ValueError(f"ring_every_steps is {every_steps}: use 0 (every generation) or a number of steps")
    if dtype not in get_args(RingDtype):
        raise ValueError(f"ring_dtype is {dtype!r}: use one of {', '.join(get_args(RingDtype))}")


def _check_evaluator(function: str | None, device: str, every_versions: int) -> None:
    if function is not None and _FUNCTION.fullmatch(function) is None:
        raise ValueError(f"evaluate is {function!r}: use module:function, for example my_evaluation:evaluate")
    if _DEVICE.fullmatch(device) is None:
        raise ValueError(f"evaluate_device is {device!r}: use a device of torch, for example cpu or cuda:0")
    if every_versions < 1:
        raise ValueError(f"evaluate_every_versions is {every_versions}: use 1 (every version) or more")


def _check_token(token: str | None) -> None:
    if token is None:
        return
    if not 0 < len(token) <= _TOKEN_CHARS_MAX or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"the token (EMA_TOKEN) has {len(token)} characters or some that are not printable ASCII: "
            f"use 1 to {_TOKEN_CHARS_MAX} without spaces, or unset it"
        )
