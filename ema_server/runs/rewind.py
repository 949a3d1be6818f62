"""Which averages a run has after it went back to an older generation. Pure: records come in, a record goes out.

Averages come and go while a run streams, and an older generation does not know of it.
"""

from __future__ import annotations

from dataclasses import replace

from ema_server.rules.ledger import Ledger
from ema_server.storage.records import AverageRecord, RunRecord


def carried_back(old: RunRecord, now: RunRecord) -> RunRecord:
    """The run as it stood at `old`, with the averages that it has `now`.

    Those that both know stand as they stood then. Those added since have no content and begin anew; those removed since
    stay removed. An average that was removed and added again in between is another one, whatever its name.
    """
    then = {_identity(average): average for average in old.averages}
    stay = tuple(then[_identity(average)] for average in now.averages if _identity(average) in then)
    begin = tuple(_begun_anew(average, old.step) for average in now.averages if _identity(average) not in then)
    return replace(old, averages=(*stay, *begin), removed=now.removed)


def _identity(average: AverageRecord) -> tuple[str, str, object]:
    return average.name, average.spec, average.ledger["origin"]


def _begun_anew(average: AverageRecord, step: int) -> AverageRecord:
    return AverageRecord(average.name, average.spec, 0, 0, 0.0, 1.0, (), Ledger(step).to_json())
