"""`AverageReader`: reads the averages of one run from the server over HTTP.

`ema_reader` is imported when it is first needed: a trainer that only streams does not need it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from trainer_client.errors import AverageError, SettingsError

if TYPE_CHECKING:
    from ema_reader import Reader, Version

_POLL_S = 0.1


class AverageReader:
    """Reads one run's averages. The defaults of `url` and `token` are those of `Reader`.

    Raises:
        SettingsError: the address cannot be used, or the reader's packages are missing.
    """

    def __init__(self, url: str | None, token: str | None, run: str) -> None:
        with open_reader(url, token) as reader:  # opened for each read: hours may pass between two
            self._url = reader.url
        self._token = token
        self._run = run

    def is_known(self) -> bool:
        """Whether the server knows a snapshot of the run.

        Raises:
            AverageError: the request fails.
        """
        from ema_reader import NotFound, ReaderError

        try:
            with open_reader(self._url, self._token) as reader:
                return reader.run(self._run).step is not None
        except NotFound:
            return False
        except ReaderError as error:
            raise AverageError(self._text("its state", error)) from error

    def weights(self, average: str, step: int, timeout_s: float) -> dict[str, Tensor]:
        """The average at `step`, once that is published.

        Raises:
            AverageError: it was not published in time, or cannot be read.
        """
        deadline = time.monotonic() + timeout_s
        with open_reader(self._url, self._token) as reader:
            while (weights := self._try(reader, average, step, is_last=time.monotonic() >= deadline)) is None:
                time.sleep(_POLL_S)
        return weights

    def newest(self, average: str, until: int) -> Version | None:
        """The newest version of an average whose step is at most `until`; None if there is none.

        Raises:
            AverageError: the request fails.
        """
        from ema_reader import NotFound, ReaderError

        try:
            with open_reader(self._url, self._token) as reader:
                versions = reader.versions(self._run, average)
        except NotFound:
            return None
        except ReaderError as error:
            raise AverageError(self._text(average, error)) from error
        return next((each for each in versions if each.step <= until and each.derived is None), None)

    def download(self, version: Version, cancelled: Callable[[], bool]) -> dict[str, Tensor] | None:
        """The weights of a version, verified, in a temporary file that is mapped into memory.

        Returns:
            None if the server no longer has the version, or `cancelled()` became true.

        Raises:
            AverageError: the request fails.
        """
        from ema_reader import NotFound, ReaderError

        try:
            with open_reader(self._url, self._token) as reader:
                return reader.load(version, progress=_Cancellable(cancelled))
        except (NotFound, _Cancelled):
            return None
        except ReaderError as error:
            raise AverageError(self._text(str(version), error)) from error

    def _try(self, reader: Reader, average: str, step: int, *, is_last: bool) -> dict[str, Tensor] | None:
        """The average at `step`; None while it is not published and time is left."""
        from ema_reader import NotFound, ReaderError

        try:
            return reader.load(reader.version(self._run, average, f"step-{step}"))
        except NotFound as error:
            if is_last:
                raise AverageError(self._text(f"{average} at step {step}", error)) from error
            return None
        except ReaderError as error:
            raise AverageError(self._text(average, error)) from error

    def _text(self, what: str, error: Exception) -> str:
        return (
            f"run {self._run}: cannot get {what} from {self._url}: {error}; "
            'url= or EMA_URL is the address that the server prints as "http"'
        )


class _Cancelled(Exception):
    """A download is no longer wanted."""


class _Cancellable:
    """The progress of a download that can be cancelled."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def start(self, name: str, size: int, done: int) -> None:
        """See `advance`."""
        self.advance(0)

    def advance(self, count: int) -> None:
        """End the download by an exception if it is no longer wanted."""
        if self._cancelled():
            raise _Cancelled


def open_reader(url: str | None, token: str | None) -> Reader:
    """A reader; the defaults are those of `Reader`.

    Raises:
        SettingsError: `ema_reader` cannot be imported, or `url` is not an HTTP address.
    """
    try:
        from ema_reader import Reader, ReaderError
    except ImportError as error:
        raise SettingsError(
            f"averages come back over HTTP, and {error.name} is missing: in a clone of ema-sidecar, "
            "pip install '.[trainer,reader]'"
        ) from error
    try:
        return Reader(url, token)
    except ReaderError as error:
        raise SettingsError(str(error)) from error
