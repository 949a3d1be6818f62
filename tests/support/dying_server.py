"""`ema serve` in which one part dies once the file `DIE` of the environment exists.

python -m support.dying_server PART serve --data ...
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any

import uvicorn

from ema_cli.main import main
from ema_server import server
from ema_server.averager.averager import Averager
from ema_server.evaluation.worker import Evaluator
from ema_server.ingest.ingest import Ingest
from ema_server.publishing.publisher import Publisher

# What each part calls repeatedly, outside the boundary that confines errors to one run.
_CALLS: dict[str, tuple[type, str]] = {
    "ingest": (Ingest, "_turn"),
    "averager": (Averager, "_publish_due"),
    "publisher": (Publisher, "_prune_if_due"),
    "evaluator": (Evaluator, "_run"),
    "HTTP": (uvicorn.Server, "on_tick"),
}
_POOLS: dict[str, Callable[[server.Server], ThreadPoolExecutor]] = {
    "metrics": lambda made: made.services.metrics._thread,
    "derived versions": lambda made: made.services.deriving._pool,
}


class _Fatal:
    """Work that ends the thread of an executor, which catches what a function raises."""

    def run(self) -> None:
        raise SystemError("injected")


def _is_due() -> bool:
    return Path(os.environ["DIE"]).exists()


def _patch(kind: type, name: str) -> None:
    original: Callable[..., Any] = getattr(kind, name)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_due():
            raise SystemError("injected")
        return original(*args, **kwargs)

    setattr(kind, name, call)


def _kill_pool(pool_of: Callable[[server.Server], ThreadPoolExecutor]) -> None:
    build = server.build

    def built(*args: Any, **kwargs: Any) -> server.Server:
        made = build(*args, **kwargs)
        threading.Thread(target=wait, args=(made,), daemon=True).start()
        return made

    def wait(made: server.Server) -> None:
        while not _is_due():
            time.sleep(0.02)
        pool_of(made)._work_queue.put(_Fatal())  # type: ignore[arg-type]

    server.build = built


if __name__ == "__main__":
    part = sys.argv.pop(1)
    if part in _CALLS:
        _patch(*_CALLS[part])
    else:
        _kill_pool(_POOLS[part])
    main()
