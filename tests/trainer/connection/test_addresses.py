"""Host names, both address families, and peers that are no ema server: real sockets on the loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from trainer_client import ConnectError, EmaClient
from trainer_client.connection.addresses import described, first_bytes, resolve
from trainer_client.connection.link import Link

_HAS_IPV6 = socket.has_ipv6 and bool(socket.getaddrinfo("::1", None))


@contextmanager
def _peer(says: bytes) -> Iterator[int]:
    """A peer that says this to each connection; the port where it listens."""

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5.0)
            connection.sendall(says)
            while connection.recv(4096):
                pass

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10.0)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_unresolvable_host_name_is_reported_as_such() -> None:
    with pytest.raises(ConnectError, match=r"host name 'no-such-host\.invalid' does not resolve .*EMA_ENDPOINT"):
        EmaClient("tcp://no-such-host.invalid:5555", "r", connect_timeout_s=1.0)


@pytest.mark.parametrize(
    ("endpoint", "resolved"),
    [
        ("tcp://127.0.0.1:5555", ["tcp://127.0.0.1:5555"]),
        ("tcp://[::1]:5555", ["tcp://[::1]:5555"]),
        ("tcp://[fe80::1%1]:5555", ["tcp://[fe80::1%1]:5555"]),
        ("ipc:///run/ema.sock", ["ipc:///run/ema.sock"]),
    ],
)
def test_numeric_addresses_and_scopes_are_kept(endpoint: str, resolved: list[str]) -> None:
    assert resolve(endpoint) == resolved


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (b"HTTP/1.0 400 Bad Request\r\n\r\n", "is the address of an HTTP server, not of ema serve's trainer port"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "(it says b'SSH-2.0-OpenSSH_')"),
        (b"\xff\0\0\0\0\0\0\0\1\x7f", "a ZeroMQ socket listens"),
    ],
)
def test_other_server_is_identified_by_its_first_bytes(says: bytes, expected: str) -> None:
    with _peer(says) as port:
        endpoint = f"tcp://127.0.0.1:{port}"
        assert expected in described(endpoint, first_bytes(endpoint))


def test_http_server_at_the_endpoint_is_named_by_the_constructor() -> None:
    with (
        _peer(b"HTTP/1.0 400 Bad Request\r\n\r\n") as port,
        pytest.raises(ConnectError, match=r'is the address of an HTTP server.*prints as "zmq"'),
    ):
        EmaClient(f"tcp://127.0.0.1:{port}", "r", connect_timeout_s=0.5)


@pytest.mark.skipif(not _HAS_IPV6, reason="this machine has no IPv6")
@pytest.mark.parametrize("family", ["127.0.0.1", "[::1]"])
@pytest.mark.parametrize("order", [sorted, lambda found: sorted(found, reverse=True)], ids=["IPv4 first", "IPv6 first"])
def test_host_with_both_families_is_reached_on_the_listening_one(
    monkeypatch: pytest.MonkeyPatch, family: str, order: Callable[[list[Any]], list[Any]]
) -> None:
    port = _free_port()
    both = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: order(both))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.IPV6, 1)
        router.setsockopt(zmq.LINGER, 0)
        router.bind(f"tcp://{family}:{port}")
        link = Link(f"tcp://both.example:{port}")
        try:
            link.open()
            for _ in range(100):
                if link.send(b"header", b"body"):
                    break
                link.wait(0.1)
                link.receive()
                link.is_broken()
            assert router.poll(10_000)
            assert router.recv_multipart()[1:] == [b"header", b"body"]
        finally:
            link.terminate()
