"""The unix socket by which trainers pass their slots: what is taken, and what is refused with a reason."""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ema_proto.wire.slot_offer import SlotOffer
from ema_server.ingest.local_socket import LocalSocket
from trainer_client.connection.local_socket import LocalSocket as TrainersSocket
from trainer_client.connection.local_socket import why_unreachable
from trainer_client.staging.slots import make_slots

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

SESSION = b"session........."
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sockets"


@pytest.fixture
def server(folder: Path) -> Iterator[LocalSocket]:
    server = LocalSocket()
    assert server.listen(str(folder)) is not None
    yield server
    server.close()


def path_of(folder: Path) -> str:
    (path,) = folder.glob("*.sock")
    return str(path)


def send(folder: Path, packet: bytes, descriptors: Sequence[int]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10.0)
    connection.connect(path_of(folder))
    socket.send_fds(connection, [packet], descriptors)
    return connection


def test_server_reads_the_slots_of_a_trainer_in_place(server: LocalSocket, folder: Path) -> None:
    slots, trainer = make_slots(5_000, 2, shared=True), TrainersSocket(SESSION)
    trainer.offer(path_of(folder), slots)
    server.receive(0.0)
    taken = server.slots_of(SESSION)

    assert taken is not None
    assert taken.nbytes == 5_000
    for slot, tensor in zip(slots, taken.tensors, strict=True):
        slot.tensor.random_(0, 256)
        assert torch.equal(tensor, slot.tensor)
    assert server.slots_of(SESSION) is None, "they are given once"
    trainer.close()


def test_server_goes_on_when_no_descriptor_is_free(server: LocalSocket, folder: Path) -> None:
    slots, trainer = make_slots(8, 1, shared=True), TrainersSocket(SESSION)
    trainer.offer(path_of(folder), slots)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        server.receive(0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert server.slots_of(SESSION) is None

    server.receive(0.0)

    assert server.slots_of(SESSION) is not None
    trainer.close()


def test_slots_offered_again_replace_the_earlier_ones(server: LocalSocket, folder: Path) -> None:
    first, second, trainer = make_slots(8, 1, shared=True), make_slots(16, 1, shared=True), TrainersSocket(SESSION)
    trainer.offer(path_of(folder), first)
    trainer.offer(path_of(folder), second)
    server.receive(0.0)
    taken = server.slots_of(SESSION)

    trainer.close()
    assert taken is not None
    assert taken.nbytes == 16


def test_slots_whose_session_does_not_join_are_given_up(server: LocalSocket, folder: Path) -> None:
    trainer = TrainersSocket(SESSION)
    trainer.offer(path_of(folder), make_slots(8, 1, shared=True))
    trainer.close()
    server.receive(0.0)
    server.receive(1000.0)

    assert server.slots_of(SESSION) is None


def test_connection_that_sends_nothing_is_closed(server: LocalSocket, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(path_of(folder))
        silent.setblocking(False)
        server.receive(0.0)
        server.receive(4.0)
        with pytest.raises(BlockingIOError):
            silent.recv(1)
        server.receive(6.0)

        assert silent.recv(1) == b""


def test_what_could_end_the_server_is_refused_with_a_reason(
    server: LocalSocket, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "ema")
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 64)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 64)
    (short,) = make_slots(63, 1, shared=True)
    assert short.descriptor is not None
    offer = SlotOffer(SESSION, 1, 64).encode()
    refused = [
        (offer, [unsealed], "not sealed"),
        (offer, [file], "no memory file"),
        (offer, [short.descriptor], "has 63 bytes, not 64"),
        (offer, [short.descriptor] * 2, "1 slots are offered, and 2 came"),
        (offer[:-1], [short.descriptor], "31 bytes"),
        (b"X" + offer[1:], [short.descriptor], "starts with"),
        (SlotOffer(SESSION, 0, 64).encode(), [short.descriptor], "0 slots"),
        (SlotOffer(SESSION, 1, 0).encode(), [short.descriptor], "0 bytes"),
    ]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for packet, descriptors, why in refused:
        with send(folder, packet, descriptors) as connection:
            server.receive(0.0)
            assert why in connection.recv(4096).decode()
            assert connection.recv(1) == b""
        assert server.slots_of(SESSION) is None
    os.close(unsealed)
    os.close(file)

    assert len(list(Path("/proc/self/fd").iterdir())) == before - 2


def test_trainer_reads_why_its_slots_were_refused(
    server: LocalSocket, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slots = make_slots(64, 1, shared=True)
    slots[0].descriptor, unsealed = os.memfd_create("unsealed"), slots[0].descriptor
    trainer = TrainersSocket(SESSION)
    trainer.offer(path_of(folder), slots)
    server.receive(0.0)

    assert "not sealed" in trainer.read_problem()
    trainer.close()
    assert "not sealed" in caplog.text
    os.close(slots[0].descriptor)
    slots[0].descriptor = unsealed


def test_trainer_says_why_it_reaches_no_server(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    assert "on another machine" in (why_unreachable(str(folder / "none.sock")) or "")
    assert "too long" in (why_unreachable(str(folder / ("x" * 120))) or "")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "can write to" in (why_unreachable(str(tmp_path / "open" / "s.sock")) or "")


def said_to_another_user(server: LocalSocket, path: str) -> str:
    """What a process of the user `nobody` gets from the socket at `path`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(20.0)
                connection.connect(path)
                socket.send_fds(connection, [SlotOffer(SESSION, 1, 8).encode()], [reading])
                os.write(writing, connection.recv(4096))
        except OSError as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        server.receive(0.0)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


@pytest.fixture
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that every user can enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "sockets"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@needs_root
@forks
def test_another_user_cannot_reach_the_socket(public: Path) -> None:
    server = LocalSocket()
    path = server.listen(str(public))
    assert path is not None
    public.parent.chmod(0o755)

    assert said_to_another_user(server, path) == "PermissionError"
    server.close()


@needs_root
@forks
def test_slots_of_a_user_who_is_not_named_are_refused(public: Path) -> None:
    server = LocalSocket([NOBODY - 1])
    path = server.listen(str(public))
    assert path is not None

    assert (
        said_to_another_user(server, path) == f"the trainer runs as user {NOBODY}: name it in the server's --shm-uids"
    )
    server.close()


@needs_root
@forks
def test_slots_of_a_user_who_is_named_are_looked_at(public: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = LocalSocket([NOBODY])
    path = server.listen(str(public))
    assert path is not None

    assert said_to_another_user(server, path) == "a slot is no memory file"
    server.close()


def test_sockets_of_killed_servers_are_removed_and_those_of_others_kept(folder: Path) -> None:
    living, starting = LocalSocket(), LocalSocket()
    path = living.listen(str(folder))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as killed:
        killed.bind(str(folder / "killed.sock"))
    other = starting.listen(str(folder))

    assert path is not None
    assert other is not None
    assert {str(each) for each in folder.iterdir()} == {path, other}
    living.close()
    starting.close()
    assert not list(folder.iterdir())


def test_server_does_without_where_it_cannot_listen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()
    for place, why in (("open", "others can write to it"), ("file", "File exists"), ("x" * 150, "too long")):
        server = LocalSocket()

        assert server.listen(str(tmp_path / place)) is None
        assert why in caplog.messages[-1]
        server.receive(0.0)
        server.close()
    assert LocalSocket().listen("off") is None
