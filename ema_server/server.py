"""The composition root: makes the server's parts, starts them in order, and stops them so that nothing applied is lost.

Comes in: a `ServerConfig`; goes out: addresses, then, when a signal comes, whether everything was published. Stopping:
not ready any more, no evaluator, no more snapshots, every run published, running downloads ended, database and folder
closed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass

from ema_server.averager.averager import Averager
from ema_server.compute.cuda import open_device
from ema_server.compute.device import Device
from ema_server.config import ServerConfig
from ema_server.derived.queue import Deriving
from ema_server.derived.store import DerivedStore
from ema_server.evaluation.metric_store import MetricStore
from ema_server.evaluation.scheduler import Validations
from ema_server.evaluation.worker import Evaluator
from ema_server.http.app import create_app
from ema_server.http.listener import HttpServer, loop_factory
from ema_server.http.services import Services
from ema_server.ingest.ingest import Ingest
from ema_server.publishing.publisher import Publisher
from ema_server.publishing.ring import Ring
from ema_server.runs.status_store import StatusStore
from ema_server.storage.catalog import Catalog
from ema_server.storage.datadir import DataDir, open_data_dir
from ema_server.telemetry import Telemetry
from ema_server.watch import until_over

log = logging.getLogger(__name__)

INGEST_STOP_S = 5.0
PUBLISH_STOP_S = 900.0  # all runs, on a slow disk; whoever supervises the process kills it earlier if it must
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
        """One line of JSON."""
        return json.dumps(asdict(self))


def run(config: ServerConfig, announce: Callable[[Ready], None]) -> bool:
    """Serve until SIGTERM or SIGINT; call `announce` once, when everything is up.

    Returns:
        Whether it ended because it was asked to, and every run was durable then.

    Raises:
        DeviceError, KernelUnavailableError, DataDirError, MetricStoreError, HttpListenError, OSError: it cannot start;
            the text says what to change.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(config, announce))


async def _serve(config: ServerConfig, announce: Callable[[Ready], None]) -> bool:
    asked = _signals()
    stopped: list[bool] = []
    announced: list[Ready] = []
    device = open_device(config.device)
    async with AsyncExitStack() as stack:
        data_dir = open_data_dir(config.data)
        stack.callback(lambda: data_dir.close(unused=not announced))
        services, averager, ingest = _build(config, device, data_dir, stack)
        http = HttpServer(create_app(services), config.http_host, config.http_port)
        http_url = await http.start()
        stack.push_async_callback(http.stop)
        await asyncio.to_thread(services.deriving.restore)
        await asyncio.to_thread(averager.start)
        stack.push_async_callback(_publish_all, averager, stopped)
        endpoint = ingest.start()
        stack.push_async_callback(asyncio.to_thread, ingest.stop, INGEST_STOP_S)
        if services.evaluator is not None:
            services.evaluator.start(http_url)
            stack.push_async_callback(services.evaluator.stop)
        announced.append(Ready(endpoint, http_url, str(config.data.absolute()), device.name, os.getpid()))
        announce(announced[0])
        dead = await until_over(asked, {"ingest": ingest.is_alive, "averager": averager.is_alive})
        if dead:
            log.critical("thread %s has died (see above): stopping, so that whoever supervises me can restart me", dead)
        log.info("stopping: no more snapshots; every run is published")
        services.stopping.set()
    return all(stopped) and not dead


def _build(
    config: ServerConfig, device: Device, data_dir: DataDir, stack: AsyncExitStack
) -> tuple[Services, Averager, Ingest]:
    metrics = MetricStore(config.data / _METRICS_FILE)
    stack.callback(metrics.close)
    catalog, statuses, telemetry = Catalog(), StatusStore(), Telemetry()
    ring = Ring(data_dir, config.ring_size, config.ring_every_steps, config.ring_dtype)
    stopping = threading.Event()
    deriving = Deriving(DerivedStore(data_dir, catalog), ring, stopping)
    stack.callback(deriving.stop)
    ring.listen(deriving.store.supersede)
    catalog.listen(ring.rename)
    keep = config.keep_generations
    publisher = Publisher(data_dir, catalog, keep_generations=keep, telemetry=telemetry, ring=ring)
    averager = Averager(config, catalog, publisher, statuses, telemetry, device=device)
    ingest = Ingest(config, averager, telemetry)
    averager.listen(ingest.published)
    catalog.listen(metrics.rename)
    validations = Validations(catalog, statuses, metrics)
    evaluator = None if config.evaluate is None else Evaluator(config, validations.abandon)
    services = Services(
        catalog=catalog,
        statuses=statuses,
        telemetry=telemetry,
        metrics=metrics,
        validations=validations,
        deriving=deriving,
        evaluator=evaluator,
        kernel=averager.kernel,
        submit=averager.submit,
        data=config.data,
        device=device,
        token=config.token,
        stopping=stopping,
    )
    return services, averager, ingest


def _signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; later ones change nothing."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    return asked


async def _publish_all(averager: Averager, stopped: list[bool]) -> None:
    durable = await asyncio.to_thread(averager.stop, PUBLISH_STOP_S)
    if not durable:
        log.error("not every run could be published: what lies after its last generation is lost")
    stopped.append(durable)
