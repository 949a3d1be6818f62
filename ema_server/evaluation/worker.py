"""The server's own evaluation worker: a child process, `ema evaluate`, restarted when it ends.

It asks this server for versions over HTTP like every worker, so that its failures cannot affect the averages. It runs
at a lower priority, and ends with the server, even if that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

from ema_server.config import ServerConfig

log = logging.getLogger(__name__)

TASK = "default"
WORKER = "server"
FIRST_PAUSE_S = 0.5
PAUSE_S_MAX = 60.0
_STEADY_S = 60.0  # after so long without a failure the pauses begin again at the shortest
_STOP_S = 5.0
_NICENESS = 10
_STDERR = 2  # the server's stdout is one line of JSON; the worker's output goes to the log


class Evaluator:
    """Supervises the worker.

    Args:
        config: `evaluate` names the function and is not None; its device and which versions it takes.
        on_end: called on the event loop with the worker's name each time the process has ended.
    """

    task = TASK

    def __init__(self, config: ServerConfig, on_end: Callable[[str], None]) -> None:
        self._config = config
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._state = "the server's evaluator is starting"

    def start(self, url: str) -> None:
        """Start the process, and keep one running until `stop`; `url` is where this machine reaches the server."""
        self._supervising = asyncio.create_task(self._supervise(url))

    def is_alive(self) -> bool:
        """Whether the process is supervised, since `start`."""
        return self._supervising is not None and not self._supervising.done()

    async def stop(self) -> None:
        """End the process: SIGTERM, by which it gives its version back, and SIGKILL if that does not help."""
        if self._supervising is None:
            return
        self._supervising.cancel()
        await asyncio.wait({self._supervising})
        if not self._supervising.cancelled() and (error := self._supervising.exception()) is not None:
            log.error("the evaluator's supervision has died", exc_info=error)
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def state(self) -> str:
        """Its state, as a sentence for a person."""
        return self._state

    async def _supervise(self, url: str) -> None:
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            started = loop.time()
            ended = await self._run(url)
            failures = 1 if loop.time() - started >= _STEADY_S else failures + 1
            pause_s = min(PAUSE_S_MAX, FIRST_PAUSE_S * 2.0 ** (failures - 1))
            self._state = f"the server's evaluator {ended}; it is restarted after {pause_s:g} s; see the server's log"
            log.warning("the evaluator %s; it is restarted in %g s", ended, pause_s)
            await asyncio.sleep(pause_s)

    async def _run(self, url: str) -> str:
        """Run the process until it ends; returns how it ended."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._arguments(),
                stdin=asyncio.subprocess.PIPE,  # it ends when this closes, which it also does when the server is killed
                stdout=_STDERR,
                env=self._environment(url),
                start_new_session=True,  # Ctrl-C goes to the server alone, which then ends it
            )
        except OSError as error:
            return f"could not be started: {error.strerror or error}"
        self._state = "the server's evaluator has started and has not asked for a version yet"
        log.info("evaluator %d: %s", self._process.pid, self._config.evaluate)
        with contextlib.suppress(OSError):  # it may have ended already
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)
        code = await self._process.wait()
        self._on_end(WORKER)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _arguments(self) -> tuple[str, ...]:
        config = self._config
        options = ("--task", TASK, "--worker", WORKER, "--device", config.evaluate_device, "--until-stdin-closes")
        every = ("--every-versions", str(config.evaluate_every_versions))
        return ("-m", "ema_cli", "evaluate", str(config.evaluate), *options, *every)

    def _environment(self, url: str) -> dict[str, str]:
        """This process's environment with the worker's settings instead of the server's, and no proxy to the server."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EMA_")}
        token = {} if self._config.token is None else {"EMA_TOKEN": self._config.token}
        known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        direct = ",".join(filter(None, (known, urlsplit(url).hostname)))
        return {**kept, "EMA_URL": url, "NO_PROXY": direct, "no_proxy": direct, **token}
