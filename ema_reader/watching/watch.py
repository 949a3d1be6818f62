"""Waits for versions of an average, downloads each one that is the newest, and delivers it to targets.

A version counts as delivered when every target has taken it. A process that was killed continues: a download is
resumed, and a version that some target may not have taken is delivered again. Versions that are published while one is
delivered are skipped, except for the newest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from ema_reader.errors import NotFound, Unreachable
from ema_reader.reader import Reader
from ema_reader.values import Version
from ema_reader.watching.folder import WatchedFolder
from ema_reader.watching.targets import DeliveryFailed, Target

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_PAUSE_S_MAX = 10.0


class Watch:
    """Keeps a folder at the newest version of an average.

    Args:
        reader: the connection to the server.
        run: the run, which need not exist yet.
        average: the average.
        folder: where the versions go, entered.
        targets: what takes them, in this order.
        poll_s: seconds between two requests while nothing is new.
    """

    def __init__(
        self,
        reader: Reader,
        run: str,
        average: str,
        folder: WatchedFolder,
        targets: Sequence[Target] = (),
        *,
        poll_s: float = 1.0,
    ) -> None:
        self._reader = reader
        self._run = run
        self._average = average
        self._folder = folder
        self._targets = targets
        self._poll_s = poll_s
        self._placed: str | None = None
        self.failure: DeliveryFailed | None = None  # of the last version, if a target refused it

    def deliveries(self) -> Iterator[Version]:
        """Each version that every target has taken; ends when the run is finished and its last version is delivered.

        A target that does not answer is asked again, with the newest version, until it does. One that refuses a version
        gets the next one.

        Raises:
            Unauthorized: the server requires a token, or another one.
            VerificationFailed: the bytes of a version differ from those that the server wrote.
            ReaderError: the disk refuses.
        """
        known, pause_s = self._folder.delivered(), _FIRST_PAUSE_S
        while (version := self._reader.wait(self._run, self._average, known, poll_s=self._poll_s)) is not None:
            try:
                self._deliver(version)
            except (NotFound, Unreachable) as error:
                log.warning("%s is not delivered yet: %s", version, error)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S_MAX)
                continue
            except DeliveryFailed as error:
                log.error("%s is not delivered: %s", version, error)
                self.failure, known = error, version.id
                continue
            self.failure, known, pause_s = None, version.id, _FIRST_PAUSE_S
            yield version

    def _deliver(self, version: Version) -> None:
        folder = self._folder.folder_of(version)
        if self._placed != version.id:
            self._reader.download(version, folder)
            self._folder.point_to(folder)
            self._placed = version.id
        for target in self._targets:
            target.take(version, folder, self._folder.link)
        self._folder.record(version)
