"""The composition root: builds the server's parts, runs them until a signal, and stops them without losing a step.

Order of stopping: readiness fails, the evaluator ends, no more snapshots, every run is published, running downloads
end, the database and the data folder are closed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ema_server.averager.averager import Averager
from ema_server.compute.cuda import open_device
from ema_server.compute.device import Device
from ema_server.config import ServerConfig
from ema_server.derived.queue import DerivationQueue
from ema_server.derived.store import DerivedStore
from ema_server.evaluation.metric_store import MetricStore
from ema_server.evaluation.scheduler import Validations
from ema_server.evaluation.worker import Evaluator
from ema_server.http.app import create_app
from ema_server.http.listener import HttpServer, loop_factory
from ema_server.http.services import Services
from ema_server.ingest.ingest import Ingest
from ema_server.priority import lower_priority
from ema_server.publishing.publisher import EraseRun, Publisher
from ema_server.publishing.ring import Ring
from ema_server.runs.lanes import LaneStore
from ema_server.runs.ranks import RanksStore
from ema_server.runs.status_store import StatusStore
from ema_server.storage.catalog import Catalog
from ema_server.storage.companions import CompanionStore
from ema_server.storage.datadir import DataDir, open_data_dir
from ema_server.storage.usage import DiskUsage
from ema_server.telemetry import Telemetry

log = logging.getLogger(__name__)

INGEST_STOP_S = 5.0
PUBLISH_STOP_S = 900.0  # all runs, on a slow disk; whatever supervises the process kills it earlier if it must
WATCH_S = 1.0
_METRICS_FILE = "metrics.sqlite"


@dataclass(frozen=True, slots=True)
class Ready:
    """Where the server can be reached, and what it is."""

    zmq: str
    http: str
    data: str
    device: str
    pid: int

    def line(self) -> str:
        return json.dumps(asdict(self))


class Server:
    """The parts of one server, connected. Nothing runs before `start`, except the database's thread.

    Attributes:
        data_dir: the data folder, locked for this process until `close`.
        services: what HTTP works with.
        publisher: the thread that makes generations durable.
        averager: the thread that owns the averages.
        ingest: the thread that owns the ZeroMQ socket; started by the caller.
    """

    def __init__(
        self, data_dir: DataDir, services: Services, publisher: Publisher, averager: Averager, ingest: Ingest
    ) -> None:
        self.data_dir = data_dir
        self.services = services
        self.publisher = publisher
        self.averager = averager
        self.ingest = ingest

    def start(self) -> None:
        """Read what is on the disk and start the averager and the publisher.

        Raises:
            OSError: the data folder cannot be read.
        """
        for run, folder in self.data_dir.deleted():
            self._complete_deletion(run, folder)
        self.services.deriving.restore()
        self.averager.start()

    def _complete_deletion(self, run: str, folder: Path) -> None:
        """Delete what an earlier process left of a deleted run, unless its metrics are those of a run since then."""
        if self.data_dir.run_folder(run).exists():
            self.publisher.submit(EraseRun(run, folder, keeps_folder=False))
        else:
            erase_run(self.services.validations, self.publisher, self.services.ranks, run, folder)

    def close(self, *, unused: bool = False) -> None:
        """Close the socket, the database and the data folder; remove a folder that `build` made if it is `unused`."""
        self.ingest.stop(INGEST_STOP_S)
        self.services.deriving.stop()
        self.services.metrics.close()
        self.data_dir.close(unused=unused)


def build(
    config: ServerConfig,
    *,
    device: Device | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
) -> Server:
    """Make the parts of a server and connect them.

    Args:
        config: the settings.
        device: where averages are kept; None opens the one that `config` names.
        clock: monotonic seconds, for schedules and holds.
        wall: seconds since the epoch, for what is written to the disk.

    Raises:
        DeviceError, KernelUnavailableError, DataDirError, MetricStoreError: a part cannot be made; the text says why.
    """
    device = open_device(config.device) if device is None else device
    with ExitStack() as undo:
        data_dir = open_data_dir(config.data)
        undo.callback(data_dir.close, unused=True)
        metrics = MetricStore(config.data / _METRICS_FILE)
        undo.callback(metrics.close)
        catalog, statuses, telemetry, stopping = Catalog(clock), StatusStore(), Telemetry(), threading.Event()
        usage, companions, ranks, lanes = DiskUsage(data_dir), CompanionStore(data_dir), RanksStore(), LaneStore()
        ring = Ring(data_dir, config.ring_size, config.ring_every_steps, config.ring_dtype)
        deriving = DerivationQueue(DerivedStore(data_dir, catalog, on_change=usage.measure), ring, stopping)
        undo.callback(deriving.stop)
        stores = (data_dir, catalog, ring, usage, companions)
        publisher = Publisher(*stores, telemetry, keep=config.keep_generations, clock=clock)
        validations = Validations(catalog, statuses, metrics)
        parts = (config, data_dir, catalog, companions, publisher, ring, statuses, telemetry)
        erase = partial(erase_run, validations, publisher, ranks)
        averager = Averager(*parts, erase=erase, device=device, clock=clock, wall=wall)
        ingest = Ingest(config, averager, companions, telemetry, ranks, lanes)
        undo.callback(ingest.stop, INGEST_STOP_S)
        ring.listen(deriving.store.supersede)
        catalog.listen(ring.rename, metrics.rename, ranks.rename)
        averager.listen(ingest.published)
        services = Services(
            catalog=catalog,
            statuses=statuses,
            telemetry=telemetry,
            metrics=metrics,
            validations=validations,
            deriving=deriving,
            usage=usage,
            ranks=ranks,
            lanes=lanes,
            submit=averager.submit,
            has_folder=data_dir.has_folder,
            config=config,
            stopping=stopping,
            device=device,
            kernel=averager.kernel,
            evaluator=None if config.evaluate is None else Evaluator(config, validations.abandon),
        )
        undo.pop_all()
        return Server(data_dir, services, publisher, averager, ingest)


def erase_run(validations: Validations, publisher: Publisher, ranks: RanksStore, run: str, folder: Path) -> None:
    """Delete a deleted run's rows from the database, then its files. Any thread; does not wait.

    The rows are first in line before those of a new run of that name. If they cannot be deleted, the folder stays, and
    the next start tries again.
    """
    ranks.remove(run)

    def erase(done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            log.error("run %s is deleted, but not its metrics; the next start tries again: %s", run, error)
        publisher.submit(EraseRun(run, folder, keeps_folder=error is not None))

    validations.delete(run).add_done_callback(erase)


def run(config: ServerConfig, announce: Callable[[Ready], None]) -> bool:
    """Serve until SIGTERM or SIGINT; call `announce` once, when everything is up.

    Returns:
        Whether it ended because of a signal, with every run durable.

    Raises:
        DeviceError, KernelUnavailableError, DataDirError, MetricStoreError, HttpListenError, OSError: it cannot start;
            the text says what to change.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(config, announce))


async def _serve(config: ServerConfig, announce: Callable[[Ready], None]) -> bool:
    signalled = _signalled()
    stopped: list[bool] = []
    announced: list[Ready] = []
    server = build(config)
    services, averager, ingest = server.services, server.averager, server.ingest
    async with AsyncExitStack() as stack:
        stack.callback(lambda: server.close(unused=not announced))
        http = HttpServer(create_app(services), config.http_host, config.http_port)
        http_url = await http.start()
        stack.push_async_callback(http.stop)
        await asyncio.to_thread(server.start)
        stack.push_async_callback(_publish_all, averager, stopped)
        endpoint = ingest.start()
        stack.push_async_callback(asyncio.to_thread, ingest.stop, INGEST_STOP_S)
        if services.evaluator is not None:
            services.evaluator.start(http.own_url)
            stack.push_async_callback(services.evaluator.stop)
        announced.append(Ready(endpoint, http_url, str(config.data.absolute()), services.device.name, os.getpid()))
        gc.freeze()  # a collection holds all threads while it looks at each object, of which the imports made most
        lower_priority(config.nice)  # not before: a start beside a training would take long
        announce(announced[0])
        dead = await wait_until_over(signalled, _threads(server, http))
        if dead:
            names = ", ".join(dead)
            log.critical("%s: it has died (see above); the server stops, so that it can be restarted", names)
        log.info("stopping: no more snapshots are received; every run is published")
        services.stopping.set()
    return all(stopped) and not dead


def _threads(server: Server, http: HttpServer) -> dict[str, Callable[[], bool]]:
    """What must run while the server serves, by name: whether it does."""
    services = server.services
    found = {
        "ingest": server.ingest.is_alive,
        "averager": server.averager.is_alive,
        "publisher": server.publisher.is_alive,
        "metrics": services.metrics.is_alive,
        "derived versions": services.deriving.is_alive,
        "HTTP": http.is_alive,
    }
    if services.evaluator is not None:
        found["evaluator"] = services.evaluator.is_alive
    return found


def _signalled() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; later ones change nothing."""
    signalled = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    return signalled


async def wait_until_over(
    signalled: asyncio.Event, alive: Mapping[str, Callable[[], bool]], period_s: float = WATCH_S
) -> tuple[str, ...]:
    """Return once `signalled` is set or a thread is dead; the names of the dead ones.

    Without its averager a server would still answer HTTP, so that nothing outside would notice.

    Args:
        signalled: set when the server is to end.
        alive: for each thread, by name, whether it runs.
        period_s: seconds between two checks of the threads.
    """
    while True:
        dead = tuple(name for name, is_alive in alive.items() if not is_alive())
        if dead or signalled.is_set():
            return dead
        try:
            await asyncio.wait_for(signalled.wait(), period_s)
        except TimeoutError:
            continue


async def _publish_all(averager: Averager, stopped: list[bool]) -> None:
    durable = await asyncio.to_thread(averager.stop, PUBLISH_STOP_S)
    if not durable:
        log.error("not every run could be published: the steps after its last generation are lost")
    stopped.append(durable)
