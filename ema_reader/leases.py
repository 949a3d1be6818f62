"""Leases of versions: a worker takes one, keeps it alive with heartbeats, and settles it with its result."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ema_reader.errors import LeaseLost, ReaderError, Unreachable
from ema_reader.transport import Transport, path_of
from ema_reader.values import Version

log = logging.getLogger(__name__)

LEASE_S = 30.0
SKIP_MAX = 1000  # versions; the server's limit
_BEATS = 3  # within the duration of a lease: two may be lost


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which versions a worker takes: see `EvaluationWorker`. An empty `averages` means all, `run` None all runs.

    With `version`, the id of one of `run` and of the only one of `averages`, it takes that one alone.
    """

    worker: str
    task: str
    run: str | None
    averages: tuple[str, ...]
    every: int = 1
    lease_s: float = LEASE_S
    poll_s: float = 1.0
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A version that this worker alone may evaluate, until `expires_in_s` seconds after the last heartbeat."""

    id: str
    version: Version
    expires_in_s: float


class Leases:
    """The leases of one server. Safe from several threads.

    Args:
        transport: the connection to the server, owned by the caller.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def ask(self, wanted: Wanted, skip: tuple[str, ...] = ()) -> tuple[Lease | None, int]:
        """A lease if a version is due, and how many due versions other workers hold.

        Args:
            wanted: which versions the worker takes.
            skip: ids of versions that it failed to evaluate.

        Raises:
            NotFound: the server does not know the run, or the version.
        """
        asked = {key: value for key, value in asdict(wanted).items() if value is not None}
        found = self._transport.post(path_of("leases"), asked | {"skip": skip[-SKIP_MAX:]})
        lease = found["lease"]
        if lease is None:
            return None, found["held"]
        return Lease(lease["id"], Version.from_json(lease["version"]), lease["expires_in_s"]), found["held"]

    def beat(self, lease: Lease) -> None:
        """Extend the lease; raises LeaseLost when another worker has the version."""
        self._transport.post(path_of("leases", lease.id, "heartbeat"))

    def settle(
        self,
        lease: Lease,
        metrics: Mapping[str, float],
        *,
        missing: Mapping[str, str] | None = None,
        error: str | None,
        samples: int | None,
        seconds: float,
    ) -> None:
        """End a lease with its result: metrics and why others are missing, or an error.

        Raises:
            LeaseLost: another worker has taken the version over.
            RequestRefused: the server does not accept it; a name or a text is too long.
        """
        body: dict[str, object] = {"metrics": dict(metrics), "missing": dict(missing or {}), "error": error}
        body |= {"samples": samples, "seconds": seconds}
        self._transport.post(path_of("leases", lease.id, "result"), body)

    def give_back(self, lease: Lease) -> None:
        """End a lease without a result: another worker may take the version at once."""
        self._transport.delete(path_of("leases", lease.id))


class Heartbeat:
    """Keeps a lease alive inside a `with` block, from a thread. While the server is unreachable, it keeps trying."""

    def __init__(self, leases: Leases, lease: Lease) -> None:
        self._leases = leases
        self._lease = lease
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._lease.expires_in_s / _BEATS):
            try:
                self._leases.beat(self._lease)
            except Unreachable as error:
                log.info("heartbeat: %s", error)
            except LeaseLost:
                log.warning("another worker has %s: its result counts", self._lease.version)
                return
            except ReaderError as error:
                log.warning("heartbeat: %s", error)
                return
