"""The printed addresses are reachable: IPv6, names with both families, scopes, and all interfaces."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import zmq

from ema_server import addresses
from ema_server.http.app import create_app
from ema_server.http.listener import HttpListenError, HttpServer
from ema_server.ingest.link import RouterLink
from support.served import WAIT_S, Served


def _link_local() -> str | None:
    """A link-local address of this machine with its scope."""
    path = Path("/proc/net/if_inet6")
    for line in path.read_text().splitlines() if path.exists() else ():
        digits, *_, name = line.split()
        if digits.startswith("fe80"):
            return f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))}%{name}"
    return None


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="needs IPv6")
HOSTS = [
    "127.0.0.1",
    "0.0.0.0",
    "localhost",
    pytest.param("[::1]", marks=needs_ipv6),
    pytest.param("[::]", marks=needs_ipv6),
    pytest.param(f"[{_link_local()}]", marks=pytest.mark.skipif(_link_local() is None, reason="needs a link")),
]


@contextmanager
def link_at(endpoint: str) -> Iterator[tuple[RouterLink, str]]:
    link = RouterLink()
    watch = threading.Thread(target=_watch, args=(link,))
    try:
        bound = link.bind(endpoint)
        watch.start()
        yield link, bound
    finally:
        link.close()
        if watch.ident is not None:
            watch.join(WAIT_S)


def _watch(link: RouterLink) -> None:
    """Read what happens to connections, as the server does in a thread, until the link is closed."""
    while link.happenings(WAIT_S) is not None:
        pass


def reaches(link: RouterLink, endpoint: str) -> bool:
    """Whether a message that is sent to `endpoint` arrives at `link`."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IPV6, 1)
        dealer.connect(endpoint)
        dealer.send(b"hello")
        link.wait(WAIT_S)
        return link.next_header() is not None


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "data")
    yield served
    served.close()


def get(url: str) -> int:
    return httpx2.get(f"{url}/healthz", timeout=WAIT_S, trust_env=False).status_code


@pytest.fixture
def two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the name `both.test` have the loopback addresses of both families, IPv6 first as resolvers give them."""
    resolve = socket.getaddrinfo

    def resolved(host: Any, *args: Any, **kwargs: Any) -> Sequence[Any]:
        if host != "both.test":
            return resolve(host, *args, **kwargs)
        return [*resolve("::1", *args, **kwargs), *resolve("127.0.0.1", *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


@pytest.mark.parametrize("host", HOSTS)
def test_trainer_reaches_the_printed_endpoint(host: str) -> None:
    with link_at(f"tcp://{host}:0") as (link, endpoint):
        assert not endpoint.endswith(":0")
        assert reaches(link, endpoint)


@pytest.mark.parametrize("host", HOSTS)
def test_reader_reaches_the_printed_url(served: Served, host: str) -> None:
    with served.listening(host=host.strip("[]")) as url:
        assert get(url) == 200


@needs_ipv6
def test_all_interfaces_of_ipv6_include_ipv4(served: Served) -> None:
    with link_at("tcp://[::]:0") as (link, endpoint):
        port = endpoint.rpartition(":")[2]
        assert reaches(link, f"tcp://127.0.0.1:{port}")
    with served.listening(host="::") as url:
        assert get(f"http://127.0.0.1:{url.rpartition(':')[2]}") == 200


@needs_ipv6
@pytest.mark.usefixtures("two_families")
def test_name_with_both_families_is_bound_in_both(served: Served) -> None:
    with link_at("tcp://both.test:0") as (link, endpoint):
        host, _, port = endpoint.rpartition(":")
        assert host == "tcp://127.0.0.1"
        assert all(reaches(link, f"tcp://{each}:{port}") for each in ("127.0.0.1", "[::1]"))
    with served.listening(host="both.test") as url:
        host, _, port = url.rpartition(":")
        assert host == "http://both.test"
        assert [get(f"http://{each}:{port}") for each in ("127.0.0.1", "[::1]")] == [200, 200]


@needs_ipv6
@pytest.mark.usefixtures("two_families")
def test_port_taken_in_one_family_is_refused(served: Served) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at tcp://both.test:{port}: .*in use.*--zmq"):
            link_at(f"tcp://both.test:{port}").__enter__()
        with pytest.raises(HttpListenError, match=f"both.test:{port}: .*in use.*--http"):
            asyncio.run(HttpServer(create_app(served.services), "both.test", port).start())


def test_unknown_name_is_refused_with_what_to_do(served: Served) -> None:
    with pytest.raises(OSError, match=r"cannot listen at tcp://nowhere.invalid:0: .*--zmq"):
        link_at("tcp://nowhere.invalid:0").__enter__()
    with pytest.raises(HttpListenError, match=r"cannot listen on http nowhere.invalid:0: .*--http"):
        asyncio.run(HttpServer(create_app(served.services), "nowhere.invalid", 0).start())


def test_unavailable_address_of_a_name_is_left_out() -> None:
    def bind(host: str, port: int) -> tuple[str, int]:
        if host == "::1":
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return host, port or 5555

    assert addresses.bind_all(("127.0.0.1", "::1"), 0, bind, print) == ["127.0.0.1"]
    assert addresses.bind_all(("::1", "127.0.0.1"), 0, bind, print) == ["127.0.0.1"]
    with pytest.raises(OSError, match="Cannot assign"):
        addresses.bind_all(("::1",), 0, bind, print)


def test_free_port_is_free_on_every_address() -> None:
    taken = iter([1001, 1002, 1003])
    released: list[str] = []

    def bind(host: str, port: int) -> tuple[str, int]:
        if port in (1001, 1002):
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return f"{host}:{port or 0}", port or next(taken)

    assert addresses.bind_all(("127.0.0.1", "::1"), 0, bind, released.append) == ["127.0.0.1:0", "::1:1003"]
    assert released == ["127.0.0.1:0"] * 2
