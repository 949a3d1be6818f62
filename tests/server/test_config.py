"""The server's settings are checked one by one and against each other, and every refusal says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ema_server.config import ServerConfig

_DATA = Path("data")


def test_defaults_are_valid_and_local() -> None:
    config = ServerConfig(_DATA)

    assert (config.http_host, config.http_port) == ("127.0.0.1", 8080)
    assert config.zmq == "tcp://127.0.0.1:5555"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"publish_every_seconds": -1.0}, "publish_every_seconds is -1.0: use 0 or more"),
        ({"publish_every_seconds": float("nan")}, "publish_every_seconds is nan"),
        ({"publish_every_seconds": float("inf")}, "publish_every_seconds is inf"),
        ({"publish_every_steps": -1}, "publish_every_steps is -1: use 0 or more"),
        ({"keep_generations": 0}, "keep_generations is 0: use 1 or more"),
        ({"ring_size": 1}, r"ring_size is 1: use 0 \(no ring\) or 2 to 256"),
        ({"ring_size": 257}, "ring_size is 257"),
        ({"ring_size": -1}, "ring_size is -1: use 0 to 256"),
        ({"ring_every_steps": -1}, "ring_every_steps is -1: use 0 or more"),
        ({"ring_dtype": "float16"}, "ring_dtype is 'float16': use one of float32, bfloat16"),
        ({"lost_after_seconds": 0.0}, "lost_after_seconds is 0.0: use 5 or more"),
        ({"lost_after_seconds": 4.9}, "lost_after_seconds is 4.9: use 5 or more"),
        ({"chunk_bytes": 1}, "chunk_bytes is 1: use 65536 to 16777216"),
        ({"kernel": "numba"}, "kernel is 'numba': use one of auto, torch, compiled"),
        ({"log_level": "loud"}, "log_level is 'loud': use one of debug, info"),
        ({"device": "mps"}, "device is 'mps': use cpu, cuda, or cuda:0"),
        ({"device": "cuda:"}, "device is 'cuda:': use cpu"),
        ({"device": "xpu:0"}, "device is 'xpu:0'"),
        ({"evaluate": "my_evaluation"}, "evaluate is 'my_evaluation': use module:function"),
        ({"evaluate": "--help:f"}, "use module:function"),
        ({"evaluate_device": "GPU 0"}, "evaluate_device is 'GPU 0': use a device of torch"),
        ({"evaluate_every_versions": 0}, "evaluate_every_versions is 0: use 1 or more"),
        ({"token": ""}, "EMA_TOKEN.* 0 characters"),
        ({"token": "two words"}, "without spaces"),
        ({"token": "schlüssel"}, "printable ASCII"),
        ({"zmq": "127.0.0.1:5555"}, "'127.0.0.1:5555' is not tcp://HOST:PORT"),
        ({"zmq": "tcp://127.0.0.1"}, "'127.0.0.1' is not HOST:PORT"),
        ({"zmq": "ipc://"}, "'ipc://' is not tcp"),
        ({"http": "8080"}, "'8080' is not HOST:PORT"),
        ({"http": "127.0.0.1:"}, "is not HOST:PORT"),
        ({"http": "127.0.0.1:65536"}, "a port from 0"),
        ({"http": "::1:8080"}, r"write \[::1\]:8080"),
    ],
)
def test_invalid_value_is_named_with_what_to_do(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ServerConfig(_DATA, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"zmq": "tcp://0.0.0.0:5555"},
        {"zmq": "tcp://*:5555"},
        {"zmq": "tcp://training-host:5555"},
        {"http": "0.0.0.0:8080"},
        {"http": "[::]:8080"},
        {"http": "192.168.0.7:8080"},
    ],
)
def test_reachable_address_needs_a_token_or_insecure(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set a token .EMA_TOKEN., listen on 127\.0\.0\.1, or say --insecure"):
        ServerConfig(_DATA, **settings)

    assert ServerConfig(_DATA, token="s3cret", **settings).token == "s3cret"
    assert ServerConfig(_DATA, insecure=True, **settings).insecure


@pytest.mark.parametrize(
    "settings",
    [{"zmq": "tcp://[::1]:0"}, {"zmq": "ipc:///tmp/ema.sock"}, {"http": "localhost:0"}, {"http": "127.9.9.9:1"}],
)
def test_loopback_and_local_sockets_need_no_token(settings: dict[str, Any]) -> None:
    ServerConfig(_DATA, **settings)


def test_ipv6_host_loses_its_brackets() -> None:
    config = ServerConfig(_DATA, http="[::1]:80")

    assert (config.http_host, config.http_port) == ("::1", 80)
