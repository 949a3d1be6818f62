"""`Reader` over a real socket: reading, waiting, and reporting."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_reader import NotFound, Reader, RequestRefused, Unauthorized, Unreachable, WaitTimeout
from ema_reader.errors import UsageError
from ema_reader.values import Version
from ema_server.runs.status_store import RunState
from support.served import WAIT_S, Served, weights


def test_runs_versions_and_one_version_are_frozen_values(served: Served, reader: Reader) -> None:
    old, new = served.publish("digits", 100).versions[0], served.publish("digits", 200).versions[0]

    assert [(run.run, run.state, run.step, run.finished) for run in reader.runs()] == [("digits", "active", 200, False)]
    assert reader.run("digits").averages[0].name == "ema-0.9"
    assert [version.id for version in reader.versions("digits", "ema-0.9")] == [new.id, old.id]
    assert reader.version("digits", "ema-0.9").id == new.id
    assert reader.version("digits", "ema-0.9", "step-100").id == old.id
    assert reader.version("digits", "ema-0.9", old.id).step == 100


def test_missing_run_average_or_version_is_not_found(served: Served, reader: Reader) -> None:
    served.publish("digits", 100)

    for missing in (
        lambda: reader.run("nope"),
        lambda: reader.versions("digits", "nope"),
        lambda: reader.version("digits", "ema-0.9", "step-7"),
        lambda: reader.metrics("nope"),
    ):
        with pytest.raises(NotFound):
            missing()


def test_unreachable_server_is_named_with_its_address() -> None:
    with Reader("http://127.0.0.1:1") as reader, pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:1"):
        reader.runs()


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host", "http://", "http://[::1"])
def test_invalid_url_is_refused_at_construction(url: str) -> None:
    with pytest.raises(UsageError):
        Reader(url)


def test_address_and_token_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tmp_path / "data", token="s3cret")
    with served.listening() as url:
        monkeypatch.setenv("EMA_URL", url)
        with Reader() as reader, pytest.raises(Unauthorized, match="EMA_TOKEN"):
            reader.runs()
        monkeypatch.setenv("EMA_TOKEN", "s3cret")
        with Reader() as reader:
            assert reader.runs() == ()
    served.close()


def test_wait_returns_the_newest_unknown_version(served: Served, reader: Reader) -> None:
    first = served.publish("digits", 100).versions[0]
    later = threading.Timer(0.2, served.publish, ("digits", 200))

    known = reader.wait("digits", "ema-0.9", timeout_s=WAIT_S, poll_s=0.02)
    later.start()
    newer = reader.wait("digits", "ema-0.9", after=known, timeout_s=WAIT_S, poll_s=0.02)
    later.join()

    assert known is not None
    assert newer is not None
    assert (known.id, newer.step) == (first.id, 200)


def test_wait_returns_none_after_the_last_version_of_a_finished_run(served: Served, reader: Reader) -> None:
    served.publish("digits", 100)
    known = reader.wait("digits", "ema-0.9", timeout_s=WAIT_S)
    finish = threading.Timer(0.2, served.show, ("digits", 100, ["ema-0.9"], RunState.FINISHED))
    finish.start()

    ended = reader.wait("digits", "ema-0.9", after=known, timeout_s=WAIT_S, poll_s=0.02)
    finish.join()

    assert known is not None
    assert ended is None
    assert reader.wait("digits", "ema-0.9", timeout_s=WAIT_S) == known


def test_wait_covers_a_missing_run_and_a_missing_server(served: Served, tmp_path: Path) -> None:
    with served.listening() as url:
        port = int(url.rsplit(":", 1)[1])
    found: list[Version | None] = []
    with Reader(url) as reader:
        waiting = threading.Thread(
            target=lambda: found.append(reader.wait("digits", "ema-0.9", timeout_s=WAIT_S, poll_s=0.02))
        )
        waiting.start()
        time.sleep(0.1)
        with served.listening(port):
            time.sleep(0.1)
            served.publish("digits", 100)
            waiting.join(WAIT_S)

    assert [version.step for version in found if version] == [100]


def test_wait_timeout_says_what_was_missing(served: Served, reader: Reader) -> None:
    version = served.publish("digits", 100).versions[0]

    with pytest.raises(WaitTimeout, match=f"no version after {version.id[:12]}"):
        reader.wait("digits", "ema-0.9", after=version.id, timeout_s=0.05, poll_s=0.02)
    with pytest.raises(WaitTimeout, match="nope"):
        reader.wait("nope", "ema-0.9", timeout_s=0.05, poll_s=0.02)


def test_loaded_weights_are_the_published_ones(served: Served, reader: Reader) -> None:
    served.publish("digits", 100, size=500)

    loaded = reader.load(reader.version("digits", "ema-0.9"))

    expected = weights("ema-0.9", 100, 500)
    assert sorted(loaded) == sorted(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rev", ["", "@latest", "@step-100", "@{short}", "@{id}"])
def test_version_is_also_accepted_as_text(served: Served, reader: Reader, tmp_path: Path, rev: str) -> None:
    version = served.publish("digits", 100).versions[0]
    target = "digits/ema-0.9" + rev.format(short=version.id[:7], id=version.id)

    assert sorted(reader.load(target)) == ["bias", "weight"]
    assert (reader.download(target, tmp_path / "out") / "version.json").is_file()
    assert reader.report(target, {"accuracy": 0.9}).version == version.id


@pytest.mark.parametrize("target", ["digits", "digits/a/b", "digits/raw@", "", 7, None])
def test_invalid_version_or_target_is_a_usage_error(reader: Reader, tmp_path: Path, target: Any) -> None:
    for use in (lambda: reader.load(target), lambda: reader.download(target, tmp_path / "out")):
        with pytest.raises(UsageError, match="RUN/AVERAGE"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_unknown_id_prefix_is_not_found(served: Served, reader: Reader) -> None:
    served.publish("digits", 100)

    with pytest.raises(NotFound, match="fffffff"):
        reader.version("digits", "ema-0.9", "fffffff")


def test_reported_metrics_are_returned_with_their_version(served: Served, reader: Reader) -> None:
    served.publish("digits", 100)
    version = reader.version("digits", "ema-0.9")

    row = reader.report(version, {"accuracy": 0.9}, task="val", worker="w", samples=10, seconds=0.1)

    assert reader.metrics("digits") == (row,)
    assert (row.version, row.step, row.task, row.metrics) == (version.id, 100, "val", {"accuracy": 0.9})


def test_metric_that_is_not_finite_is_reported_as_missing(served: Served, reader: Reader) -> None:
    served.publish("digits", 100)

    row = reader.report("digits/ema-0.9", {"top1": 0.9, "loss": math.nan, "ppl": math.inf, "x": -math.inf})

    assert reader.metrics("digits") == (row,)
    assert (row.metrics, row.missing) == ({"top1": 0.9}, {"loss": "nan", "ppl": "inf", "x": "-inf"})


def test_report_needs_either_metrics_or_an_error(served: Served, reader: Reader) -> None:
    served.publish("digits", 100)
    version = reader.version("digits", "ema-0.9")

    with pytest.raises(UsageError):
        reader.report(version)
    with pytest.raises(UsageError):
        reader.report(version, {"x": 1.0}, error="both")
    with pytest.raises(RequestRefused):
        reader.report(version, {"x" * 300: 1.0})


def test_readiness_is_reported_per_check(served: Served, reader: Reader) -> None:
    unready, checks = reader.ready()
    served.beat()

    assert (unready, checks["ingest"]["ok"]) == (False, False)
    assert reader.ready()[0]
