"""Connections within bounds, over real sockets: what a peer may send, and how long it may take to send or to read."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from threading import Event

import pytest

from ema_server.http import connection, middleware
from support.served import WAIT_S, Served
from support.waiting import eventually

pytestmark = pytest.mark.process  # of sockets and waits, which take most of their time

Open = Callable[[], socket.socket]
GET = b"GET /v1/runs HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def connect(url: str) -> Iterator[Open]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(socket.create_connection((host, int(port)), timeout=WAIT_S)))


def _rest(peer: socket.socket) -> bytes:
    """All that arrives until the server closes the connection."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while part := peer.recv(1 << 16):
            received += part
    return bytes(received)


def _status(answer: bytes) -> int:
    return int(answer.split()[1])


def _send(peer: socket.socket, data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # the server has closed the connection meanwhile
        peer.sendall(data)


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X-Long: " + b"x" * (1 << 20) + b"\r\n\r\n",
        GET + b"X-Many: x\r\n" * 100_000 + b"\r\n",
        b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GET + b"X-Endless: " + b"x" * (1 << 20),
    ],
    ids=["one header", "many headers", "path", "no end"],
)
def test_head_that_is_too_long_is_refused(connect: Open, head: bytes) -> None:
    peer = connect()
    _send(peer, head)

    answer = _rest(peer)
    assert not answer or _status(answer) == 431, "a reset can overtake the answer"
    other = connect()
    other.sendall(GET + b"Connection: close\r\n\r\n")
    assert _status(_rest(other)) == 200


def test_head_within_the_limit_is_answered(connect: Open) -> None:
    peer = connect()
    peer.sendall(GET + b"X-Long: " + b"x" * (connection.HEAD_BYTES_MAX - 200) + b"\r\nConnection: close\r\n\r\n")

    assert _status(_rest(peer)) == 200


def test_requests_may_arrive_byte_by_byte_and_several_at_once(connect: Open) -> None:
    body = json.dumps({"worker": "w"}).encode()
    post = b"POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    post += b"Content-Length: %d\r\n\r\n" % len(body) + body
    peer = connect()
    for byte in post:
        peer.sendall(bytes([byte]))
    peer.sendall(post + post + GET + b"\r\n" + GET + b"Connection: close\r\n\r\n")

    assert _rest(peer).count(b"HTTP/1.1 200") == 5


@pytest.mark.parametrize(("sent", "status"), [(b"", None), (b"GET /", 408), (GET, 408), (b"\r\n", 408)])
def test_head_must_arrive_in_time(
    connect: Open, monkeypatch: pytest.MonkeyPatch, sent: bytes, status: int | None
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    peer = connect()
    peer.sendall(sent)

    answer = _rest(peer)
    assert (_status(answer) if answer else None) == status


def test_slow_bytes_do_not_postpone_the_deadline(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.5)
    peer = connect()
    peer.sendall(GET + b"\r\n")  # the second request on a connection has the same deadline
    assert _status(peer.recv(1 << 16)) == 200

    dripping = Event()

    def drip() -> None:
        while not dripping.wait(0.02):
            _send(peer, b"\r\n")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(drip)
        try:
            assert b"HTTP/1.1 408" in _rest(peer)
        finally:
            dripping.set()


def test_body_must_arrive_in_time(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_S", 0.2)
    peer = connect()
    peer.sendall(b"POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\nConnection: close\r\n\r\n{")

    answer = _rest(peer)
    assert _status(answer) == 408
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "upload_timeout"


def test_body_that_was_answered_is_read_for_a_while_only(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REST_BYTES_MAX", 1 << 20)
    peer = connect()
    peer.sendall(b"POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\n")
    assert _status(peer.recv(1 << 16)) == 413
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        peer.sendall(bytes(1 << 30))


def test_download_that_is_not_read_ends_and_releases_its_version(
    connect: Open, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.2)
    version = served.publish("digits", 1, size=8 << 20).versions[0]
    peer = connect()
    path = f"/v1/runs/digits/averages/ema-0.9/versions/{version.id}/files/model.safetensors"
    peer.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    eventually(lambda: served.catalog._holds, "the download has begun", WAIT_S)

    eventually(lambda: not served.catalog._holds, "the download is ended", WAIT_S)
    assert len(_rest(peer)) < version.files[0].size


def test_download_that_is_read_slowly_goes_on(connect: Open, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_S", 1.5)
    version = served.publish("digits", 1, size=4 << 20).versions[0]
    path = f"/v1/runs/digits/averages/ema-0.9/versions/{version.id}/files/model.safetensors"
    peer = connect()
    peer.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    received = 0
    for _ in range(40):  # less than the system's buffers hold, so that the server writes nothing meanwhile
        time.sleep(0.1)
        received += len(peer.recv(1 << 16))

    assert received + len(_rest(peer)) > version.files[0].size


def test_number_of_connections_is_bounded(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "connections_max", lambda: 3)
    peers = [connect() for _ in range(3)]
    for peer in peers:
        peer.sendall(GET + b"\r\n")
        assert _status(peer.recv(1 << 16)) == 200
    assert _status(_rest(connect())) == 503
    peers[0].close()

    def is_answered() -> bool:
        peer = connect()
        _send(peer, GET + b"Connection: close\r\n\r\n")
        return _status(_rest(peer)) == 200

    eventually(is_answered, "there is room again", WAIT_S)


def test_number_of_connections_leaves_descriptors_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, allowed in ((1024, 256), (65536, 21760), (100, 16)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connection.connections_max() == allowed
