"""The errors of `ema_reader`. Each text says what to do; `exit_code` is what the command line ends with."""

from __future__ import annotations

from typing import ClassVar


class ReaderError(Exception):
    """Base class; raised itself for failures without a class of their own, such as a full disk."""

    exit_code: ClassVar[int] = 1


class UsageError(ReaderError, ValueError):
    """An argument or a variable of the environment is wrong: an address, a name, a function to evaluate with."""

    exit_code = 2


class NotFound(ReaderError):
    """The server does not have the run, average, version or file, or has deleted it."""

    exit_code = 3


class RunUnreadable(NotFound):
    """The server has files of the run, and no generation that it can read."""


class Unauthorized(ReaderError):
    """The server requires a token, or another one."""

    exit_code = 4


class Unreachable(ReaderError):
    """Nothing answers at the address, the connection broke, or the server cannot work now. A later try may succeed."""

    exit_code = 5


class VerificationFailed(ReaderError):
    """The downloaded bytes differ from those that the server wrote. No file was put in place."""

    exit_code = 6


class RecalibrationFailed(ReaderError):
    """BatchNorm statistics could not be recomputed; the text names the user's loader."""


class RequestRefused(ReaderError):
    """The server refused the request; `code` names the reason, `status` is the HTTP status."""

    def __init__(self, text: str, *, code: str, status: int) -> None:
        super().__init__(text)
        self.code = code
        self.status = status


class WrongValue(RequestRefused):
    """The server does not accept a value of the request."""

    exit_code = 2


class LeaseLost(RequestRefused):
    """Another worker holds the version: this one took longer to answer than its lease lasts."""


class WaitTimeout(ReaderError, TimeoutError):
    """The awaited version or result did not appear in time."""
