"""Peers that send without being understood are disconnected, and a trainer beside them notices nothing."""

from __future__ import annotations

import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from ema_proto.wire import messages as m
from ema_proto.wire.codec import encode
from ema_server.ingest import peers
from support.processes import ServerProcess
from support.toy import Toy
from support.waiting import eventually
from trainer_client import EmaClient

WAIT_S = 60.0
MORE, LONG, COMMAND = 1, 2, 4  # flags of a ZMTP frame
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("peers") / "data") as process:
        yield process


@pytest.fixture
def peer(server: ServerProcess) -> Iterator[socket.socket]:
    host, _, port = server.zmq.removeprefix("tcp://").rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=WAIT_S)) as connection:
        yield connection


@pytest.fixture(autouse=True)
def trainer(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[None]:
    """A trainer that streams meanwhile."""
    with EmaClient(server.zmq, f"beside-{abs(hash(request.node.name))}", ["ema:0.9"], when_behind="wait") as client:
        client.update(Toy().at(1), 1)
        yield
        client.update(Toy().at(2), 2)
        assert client.flush(WAIT_S)
        assert client.stats()["reconnects"] == 0
        assert client.stats()["committed"] == 2


def _frame(flags: int, body: bytes) -> bytes:
    return struct.pack("!BQ", flags | LONG, len(body)) + body


def _shake_hands(peer: socket.socket, routing_id: bytes = b"") -> None:
    """The handshake of ZMTP 3.0 with the mechanism NULL (RFC 23)."""
    peer.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    greeting = b""
    while len(greeting) < 64:  # libzmq refuses some peers that do not wait for its greeting
        greeting += _received(peer, 64 - len(greeting))
    properties = ((b"Socket-Type", b"DEALER"), (b"Identity", routing_id))
    ready = b"\x05READY" + b"".join(
        struct.pack("!B", len(name)) + name + struct.pack("!I", len(value)) + value for name, value in properties
    )
    peer.sendall(_frame(COMMAND, ready))
    _receive_until(peer, b"READY")


def _receive_until(peer: socket.socket, wanted: bytes) -> None:
    received = b""
    while wanted not in received:
        received += _received(peer, 1 << 16)


def _received(peer: socket.socket, at_most: int) -> bytes:
    part = peer.recv(at_most)
    if not part:
        raise ConnectionResetError("the server closed the connection")
    return part


def _greet(peer: socket.socket) -> None:
    header, body = encode(m.Hello((1,)), session=bytes(range(1, 17)), epoch=0)
    peer.sendall(_frame(MORE, header) + _frame(0, body))
    _receive_until(peer, b"EMAS")


def _send_until_closed(peer: socket.socket, data: bytes, times: int) -> int:
    """How many bytes were sent before the server closed the connection."""
    sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(times):
            sent += peer.send(data)
    return sent


def _memory(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.popen.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def _is_closed(peer: socket.socket) -> Callable[[], bool]:
    def check() -> bool:
        try:
            return not peer.recv(1 << 16)
        except ConnectionResetError:
            return True

    return check


def test_peer_that_says_nothing_is_disconnected(peer: socket.socket) -> None:
    started = time.monotonic()
    eventually(_is_closed(peer), "the server closes the connection", WAIT_S)

    assert time.monotonic() - started > peers.GREETING_S / 2, "a trainer has some time"


def test_peer_that_is_no_trainer_is_disconnected(peer: socket.socket) -> None:
    _shake_hands(peer)
    peer.sendall(_frame(MORE, b"hello") + _frame(0, b"world"))

    eventually(_is_closed(peer), "the server closes the connection", WAIT_S)


@pytest.mark.parametrize("routing_id", [b"", b"r" * (8 * MIB)], ids=["", "long routing id"])
def test_message_without_an_end_is_cut_off_before_the_hello(
    server: ServerProcess, peer: socket.socket, routing_id: bytes
) -> None:
    before = _memory(server)
    with suppress(BrokenPipeError, ConnectionResetError):
        _shake_hands(peer, routing_id)

    sent = _send_until_closed(peer, _frame(MORE, bytes(MIB)), 4000)
    assert sent < 4000 * MIB, "the server closed the connection"
    eventually(lambda: _memory(server) < before + 64 * MIB, "the memory is released", WAIT_S)


def test_message_without_an_end_of_a_greeted_peer_is_cut_off(server: ServerProcess, peer: socket.socket) -> None:
    before = _memory(server)
    _shake_hands(peer)
    _greet(peer)
    time.sleep(1.0)

    sent = _send_until_closed(peer, _frame(MORE, bytes(MIB)), 40_000)
    assert peers.UNREAD_BYTES_MAX / 2 < sent < 40_000 * MIB, "the server closed the connection"
    eventually(lambda: _memory(server) < before + 64 * MIB, "the memory is released", WAIT_S)


def test_greeted_peer_stays(server: ServerProcess, peer: socket.socket) -> None:
    _shake_hands(peer)
    _greet(peer)
    peer.settimeout(1.5 * peers.GREETING_S)

    with pytest.raises(TimeoutError):
        peer.recv(1 << 16)


def test_connections_leave_descriptors_for_http(server: ServerProcess) -> None:
    used = len(list(Path(f"/proc/{server.popen.pid}/fd").iterdir()))
    pid = server.popen.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 600, before[1]))
    host, _, port = server.zmq.removeprefix("tcp://").rpartition(":")
    try:
        with ExitStack() as stack:
            for _ in range(800):
                stack.enter_context(closing(socket.create_connection((host, int(port)), timeout=WAIT_S)))
            assert server.get("/v1/runs")["runs"]
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
