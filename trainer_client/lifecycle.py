"""Whether a client may still be used, and by this process at all.

Comes in: the end of a client. Goes out: yes, no, or `ClientClosed`. Knows neither threads nor sockets.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from enum import StrEnum

from trainer_client.errors import ClientClosed

log = logging.getLogger("ema")


class State(StrEnum):
    """Where a client is in its life."""

    OPEN = "open"
    FINISHED = "finished"
    CLOSED = "closed"


class Lifecycle:
    """The state of one client, and the process that it belongs to.

    A fork (a data loader's worker) has a copy of the client but not of its thread: there, everything does nothing.
    """

    def __init__(self) -> None:
        self.state = State.OPEN
        self._pid = os.getpid()
        self._fork_logged = False

    def forked(self) -> bool:
        """Whether this process is a fork of the one that made the client."""
        if os.getpid() == self._pid:
            return False
        if not self._fork_logged:
            log.debug("ema: process %d is a fork of trainer %d: its EmaClient does nothing", os.getpid(), self._pid)
            self._fork_logged = True
        return True

    def ended(self) -> bool:
        """Whether there is nothing left to end here: finished, closed, or a fork."""
        return self.forked() or self.state is not State.OPEN

    def usable(self) -> bool:
        """False in a fork.

        Raises:
            ClientClosed: the client was closed or finished.
        """
        if self.forked():
            return False
        if self.state is not State.OPEN:
            raise ClientClosed(f"this EmaClient is {self.state.value}: make a new one to go on with the run")
        return True


def when_forgotten(client: object, life: Lifecycle, close: Callable[[], None]) -> Callable[[], None]:
    """Have `close` called once `client` is garbage or the interpreter exits, in the process that made it.

    A client that nobody closed must not keep the process from ending. `close` must not refer to the client.

    Returns:
        What to call when the client was closed: it takes all of this back.
    """
    finalizer = weakref.finalize(client, _close_aside, life, close)
    # Exit functions run newest first. weakref's own is as old as the first finalizer of the process: it would run after
    # ZeroMQ's, when nothing can be sent any more.
    finalizer.atexit = False

    def at_exit() -> None:
        if finalizer.detach() is not None and not life.forked():
            close()

    def cancel() -> None:
        finalizer.detach()
        atexit.unregister(at_exit)

    atexit.register(at_exit)
    return cancel


def _close_aside(life: Lifecycle, close: Callable[[], None]) -> None:
    # Garbage is collected in whatever thread happens to allocate: the trainer's must not wait for a goodbye, and the
    # client's own cannot wait for its end.
    if not life.forked():
        threading.Thread(target=close, name="ema-close").start()
