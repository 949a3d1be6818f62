"""When the sender gives a connection up, and when it sends a heartbeat."""

from __future__ import annotations

from ema_proto.limits import HANDSHAKE_S, HEARTBEAT_S, REQUEST_S, SERVER_SILENT_S, STALL_S


class Timeouts:
    """The clocks of one connection."""

    def __init__(self) -> None:
        self._opened_at = self._heard_at = self._progress_at = self._beat_at = self._asked_at = 0.0
        self._request: int | None = None

    def restart(self, now: float) -> None:
        self._opened_at = self._heard_at = self._progress_at = self._beat_at = now
        self._request = None

    def heard(self, now: float) -> None:
        self._heard_at = now

    def progressed(self, now: float) -> None:
        """An awaited answer came closer, or waiting has just begun."""
        self._progress_at = now

    def overdue(self, now: float, *, greeting: bool, awaiting: bool, request: int | None) -> str | None:
        """The reason to give the connection up, or None.

        Args:
            now: the time.
            greeting: HELLO is not answered yet.
            awaiting: a JOIN or a snapshot is not answered yet.
            request: the oldest request that was written and is not answered yet.
        """
        if request != self._request:
            self._request, self._asked_at = request, now
        if greeting and now - self._opened_at > HANDSHAKE_S:
            return "no answer to HELLO"
        if now - self._heard_at > SERVER_SILENT_S:
            return f"nothing heard for {SERVER_SILENT_S:.0f} s"
        if awaiting and now - self._progress_at > STALL_S:
            return f"no answer to JOIN or to a snapshot for {STALL_S:.0f} s"
        if request is not None and now - self._asked_at > REQUEST_S:
            return f"no answer to a request for {REQUEST_S:.0f} s"
        return None

    def beat_is_due(self, now: float) -> bool:
        """Whether to send a heartbeat now; if so, it counts as sent."""
        is_due = now - self._beat_at >= HEARTBEAT_S
        if is_due:
            self._beat_at = now
        return is_due
