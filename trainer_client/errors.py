"""The errors of the trainer's side. They are raised at construction, at joining, or for a programmer's error.

EmaClientError
├── SettingsError   an argument or an EMA_* variable is wrong
├── ConnectError    the server cannot be reached, or refuses this client
├── JoinError       the server refuses the run; `code` says why
├── PlanError       the model holds something that cannot be streamed, or has changed since it was joined
├── RewindError     the run could not be taken back to a step
├── AverageError    an average could not be fetched from the server
└── ClientClosed    the client was used after close() or finish()
"""

from __future__ import annotations

from ema_proto.errors import RejectCode


class EmaClientError(Exception):
    """Base of everything that the trainer's side raises."""


class SettingsError(EmaClientError, ValueError):
    """An argument or an environment variable has a value that cannot be used."""


class ConnectError(EmaClientError, ConnectionError):
    """The server could not be reached, speaks another version, or refused the token."""


class JoinError(EmaClientError):
    """The run could not be joined. `code` is the server's reason, None when the server did not answer."""

    def __init__(self, text: str, code: RejectCode | None = None) -> None:
        super().__init__(text)
        self.code = code


class GatheredError(Exception):
    """FSDP holds a sharded parameter whole at this moment; its name is the argument. Does not leave the package."""


class PlanError(EmaClientError, ValueError):
    """A tensor cannot be streamed, or the tensors are no longer those that the run was joined with."""


class RewindError(EmaClientError):
    """The run could not be taken back; nothing was changed."""


class AverageError(EmaClientError):
    """The average could not be fetched from the server, or not in time."""


class ClientClosed(EmaClientError):
    """The client was closed or finished: make a new one to go on with the run."""
