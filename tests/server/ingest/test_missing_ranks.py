"""The log names the ranks that go missing, once, and those that return."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ema_proto.receiver import events as e
from support.served import Served


def test_log_names_each_missing_rank_once_and_when_it_is_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ema")
    served = Served(tmp_path)
    served.services.ranks.joined("llm", 4, is_new=True)
    try:
        for missing in ((2,), (1, 2), (1,), ()):
            served.server.ingest._take_event(e.RanksMissing("llm", 1, missing))
        for step in range(100):
            served.server.ingest._take_event(e.StepDropped("llm", 1, step, 2, "lost", "rank 2 is lost"))
        ranks = served.services.ranks.get("llm")
    finally:
        served.close()
    lines = [(record.levelname, record.getMessage().split(" not heard")[0]) for record in caplog.records]

    assert lines == [
        ("WARNING", "run llm: rank 2 is"),
        ("WARNING", "run llm: rank 1 is"),
        ("INFO", "run llm: rank 2 is back"),
        ("INFO", "run llm: rank 1 is back"),
    ]
    assert ranks is not None
    assert (ranks.present, ranks.dropped_steps) == (4, 100)
