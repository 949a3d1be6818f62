"""The averages of a run: list, add and remove them, and list the steps inside a version."""

from __future__ import annotations

from ema_reader.transport import Transport, path_of
from ema_reader.values import Average, Ledger

ANSWER_S = 960.0  # longer than the server waits for a generation on a slow disk


class Averages:
    """The averages of one server's runs. Safe from several threads.

    Args:
        transport: the connection to the server, owned by the caller.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def of(self, run: str) -> tuple[Average, ...]:
        """The averages of a run, in the order in which they were added.

        Raises:
            NotFound: the server does not know the run.
        """
        answer = self._transport.get(path_of("runs", run, "averages"))
        return self._transport.read(answer, lambda body: tuple(map(Average.from_json, body["averages"])))

    def add(self, run: str, spec: str, name: str = "") -> Average:
        """Add an average to a run while its trainer streams; it begins with the next snapshot. Returns when durable.

        Args:
            run: the run.
            spec: the rule, e.g. `"ema:0.9995"`.
            name: name of the average; empty for the rule's default.

        Raises:
            NotFound: the server does not know the run.
            RequestRefused: the rule is invalid, the name is taken, no trainer streams the run, or memory is short.
            Unreachable: it could not be made durable; nothing was added.
        """
        body = {"spec": spec, **({"name": name} if name else {})}
        answer = self._transport.post(path_of("runs", run, "averages"), body, answer_s=ANSWER_S)
        return self._transport.read(answer, Average.from_json)

    def remove(self, run: str, average: str) -> None:
        """Remove an average from a run while its trainer streams. Its versions stay until the server prunes them.

        Raises:
            NotFound: there is no such run or average.
            RequestRefused: no trainer streams the run, or it is the only average with weights.
            Unreachable: it could not be made durable; nothing was removed.
        """
        self._transport.delete(path_of("runs", run, "averages", average), answer_s=ANSWER_S)

    def ledger(self, run: str, average: str, rev: str = "latest", tail: int | None = None) -> Ledger:
        """The steps inside a version with their shares, newest first: enough to recompute it from snapshots.

        Args:
            run: the run.
            average: one of its averages.
            rev: 40 hex digits, `step-N` or `latest`.
            tail: only this many newest steps; None for all.

        Raises:
            NotFound: the server does not have the version.
            RequestRefused: the version was derived from other versions.
        """
        path = path_of("runs", run, "averages", average, "versions", rev, "ledger")
        answer = self._transport.get(path if tail is None else f"{path}?tail={tail}")
        return self._transport.read(answer, Ledger.from_json)
