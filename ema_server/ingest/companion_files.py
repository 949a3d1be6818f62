"""The thread that stores companion files: it writes and syncs them while ingest goes on to receive snapshots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ema_proto.receiver.events import FileReceived
from ema_proto.wire.files import FileSpec
from ema_server.storage.catalog import FileEntry
from ema_server.storage.companions import CompanionStore, DamagedFile, Draft

logger = logging.getLogger("ema")


class FileWriter:
    """Stores parts of companion files in the order in which they are put.

    Args:
        store: where they go.
        report: called on the writer's thread for each part, with why it could not be stored, or None.
    """

    def __init__(self, store: CompanionStore, report: Callable[[FileReceived, str | None], None]) -> None:
        self._store = store
        self._report = report
        self._drafts: dict[str, tuple[int, Draft]] = {}  # by run, with the ticket of the session
        self._pool = ThreadPoolExecutor(1, "companion-files")

    def put(self, part: FileReceived) -> None:
        """Store a part. The credit bounds how many wait."""
        self._pool.submit(self._take, part)

    def drop(self, run: str) -> None:
        """The session is over: delete what is not whole."""
        self._pool.submit(self._discard, run)

    def stop(self) -> None:
        """Finish the part that is being written, drop the others, and end the thread."""
        self._pool.shutdown(cancel_futures=True)
        for run in tuple(self._drafts):
            self._discard(run)

    def _take(self, part: FileReceived) -> None:
        if part.offset > 0 and self._drafts.get(part.run, (None, None))[0] != part.ticket:
            return  # an earlier part has failed, and with it the session
        problem = None
        try:
            self._write(part)
        except DamagedFile as error:
            problem = str(error)
        except OSError as error:
            problem = f"file {part.file.name!r} could not be stored: {error.strerror or error}"
        except Exception as error:
            logger.exception("run %s: internal error while file %s was stored", part.run, part.file.name)
            problem = f"file {part.file.name!r} could not be stored: internal error: {error!r}"
        if problem is not None:
            logger.warning("run %s: %s", part.run, problem)
            self._discard(part.run)
        self._report(part, problem)

    def _write(self, part: FileReceived) -> None:
        if part.offset == 0:
            self._discard(part.run)
            self._drafts[part.run] = part.ticket, self._store.receive(part.run, entry_of_spec(part.file))
        if self._drafts[part.run][1].write(part.payload):
            del self._drafts[part.run]

    def _discard(self, run: str) -> None:
        _, draft = self._drafts.pop(run, (None, None))
        if draft is not None:
            draft.discard()


def entry_of_spec(file: FileSpec) -> FileEntry:
    """A file of the wire as the storage names it."""
    return FileEntry(file.name, file.nbytes, file.sha256)
