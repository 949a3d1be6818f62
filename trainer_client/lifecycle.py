"""Whether a client may be used in this process, and how a client that was never closed is closed."""

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
    """The state of a client. An inert one does nothing and raises nothing: another client has its run."""

    OPEN = "open"
    FINISHED = "finished"
    CLOSED = "closed"
    INERT = "inert"


class Lifecycle:
    """The state of one client, and the process that it belongs to.

    A fork (a data loader's worker) has a copy of the client but not of its thread: every method does nothing there.
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
        """Whether there is nothing left to end here: finished, closed, inert, or a fork."""
        return self.forked() or self.state is not State.OPEN

    def usable(self) -> bool:
        """False in a fork, and for an inert client: its methods do nothing.

        Raises:
            ClientClosed: the client was closed or finished.
        """
        if self.forked() or self.state is State.INERT:
            return False
        if self.state is not State.OPEN:
            raise ClientClosed(f"this EmaClient is {self.state.value}: make a new one to go on with the run")
        return True


def when_forgotten(client: object, life: Lifecycle, close: Callable[[], None]) -> Callable[[], None]:
    """Have `close` called once `client` is garbage or the interpreter exits, in the process that made it.

    A client that was never closed must not keep the process from ending. `close` must not refer to the client.

    Returns:
        A function that cancels this, to be called when the client is closed.
    """
    finalizer = weakref.finalize(client, _close_aside, life, close)
    # Exit functions run newest first. weakref's own is as old as the first finalizer of the process: it would run after
    # ZeroMQ's, when nothing can be sent.
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
    # Garbage is collected in whichever thread allocates: the training thread must not wait for the connection to
    # close, and the connection's own thread cannot wait for its own end.
    if not life.forked():
        threading.Thread(target=close, name="ema-close").start()
