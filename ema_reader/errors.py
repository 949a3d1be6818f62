"""Every way reading can fail. Each error says what to do; `exit_code` is what the command line ends with."""

from __future__ import annotations

from typing import ClassVar


class ReaderError(Exception):
    """Base of the errors here; raised itself when the disk or another download is in the way."""

    exit_code: ClassVar[int] = 1


class UsageError(ReaderError, ValueError):
    """An argument is wrong: an address, a name, a function to evaluate with."""

    exit_code = 2


class NotFound(ReaderError):
    """The server has no such run, average, version or file (any more)."""

    exit_code = 3


class Unauthorized(ReaderError):
    """The server wants a token, or another one."""

    exit_code = 4


class Unreachable(ReaderError):
    """Nobody answers at the address, the connection broke, or the server says that it cannot work now."""

    exit_code = 5


class VerificationFailed(ReaderError):
    """What was downloaded is not what the server wrote. Nothing was put in place."""

    exit_code = 6


class RecalibrationFailed(ReaderError):
    """BatchNorm statistics could not be recomputed; the text names the function that gives model and batches."""


class RequestRefused(ReaderError):
    """The server understood and refused; `code` is its word for why, `status` the HTTP status."""

    def __init__(self, text: str, *, code: str, status: int) -> None:
        super().__init__(text)
        self.code = code
        self.status = status


class WrongValue(RequestRefused):
    """The server says that a value of the request is not one that it takes."""

    exit_code = 2


class LeaseLost(RequestRefused):
    """Another worker has the version: this one took longer to answer than its lease lasts."""


class WaitTimeout(ReaderError, TimeoutError):
    """Nothing new appeared in time."""
