"""`ema watch` as a process: what it prints, its exit codes, and what happens when it is killed."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from ema_server.runs.status_store import RunState
from support.processes import Process
from support.recording_proxy import recording
from support.served import WAIT_S, Served
from support.stand_in_engine import engine
from support.waiting import eventually

pytestmark = pytest.mark.process


def started(url: str, into: Path, *options: str, target: str = "digits/ema-0.9") -> Process:
    command = ("watch", target, "--into", str(into), "--url", url, "--poll-s", "0.05", *options)
    return Process("-m", "ema_cli", *command)


def finish(served: Served, step: int) -> None:
    served.show("digits", step, ["ema-0.9"], RunState.FINISHED)


def test_each_delivered_version_is_one_line_of_json(served: Served, url: str, tmp_path: Path) -> None:
    first = served.publish("digits", 100).versions[0]
    with engine() as sglang, started(url, tmp_path / "w", "--json", "--post", f"sglang={sglang.url}") as watch:
        watch.wait_line(lambda line: first.id in line)
        second = served.publish("digits", 200).versions[0]
        watch.wait_line(lambda line: second.id in line)
        finish(served, 200)

        assert watch.wait() == 0, list(watch.errors)
        shown = [json.loads(line) for line in watch.lines]
        assert [each["version"]["id"] for each in shown] == sglang.labels() == [first.id, second.id]
        assert [Path(each["path"]).resolve() for each in shown][1] == (tmp_path / "w" / "current").resolve()


def test_last_version_that_is_refused_is_exit_code_1(served: Served, url: str, tmp_path: Path) -> None:
    served.publish("digits", 100)
    finish(served, 100)
    with engine() as sglang:
        sglang.answers["/update_weights_from_disk"] = (400, {"success": False, "message": "shapes differ"})
        with started(url, tmp_path / "w", "--post", f"sglang={sglang.url}") as watch:
            assert watch.wait() == 1
            assert "shapes differ" in watch.errors[-1]


@pytest.mark.parametrize(
    ("target", "options", "text"),
    [
        ("digits/ema-0.9@step-1", (), "leave out @REV"),
        ("digits", (), "RUN/AVERAGE"),
        ("digits/ema-0.9", ("--post", "tgi=http://127.0.0.1:1"), "sglang=URL"),
        ("digits/ema-0.9", ("--cmd", "'open"), "cannot be split"),
    ],
)
def test_wrong_usage_is_exit_code_2(url: str, tmp_path: Path, target: str, options: tuple[str, ...], text: str) -> None:
    with started(url, tmp_path / "w", *options, target=target) as watch:
        assert watch.wait() == 2
        assert text in watch.errors[-1]


def test_killed_while_the_engine_loads_delivers_the_version_again_and_then_no_more(
    served: Served, url: str, tmp_path: Path
) -> None:
    version = served.publish("digits", 100).versions[0]
    finish(served, 100)
    with engine() as sglang:
        options = ("--post", f"sglang={sglang.url}")
        sglang.blocked.set()
        with started(url, tmp_path / "w", *options) as watch:
            eventually(lambda: len(sglang.requests) == 1, "the first request", 3 * WAIT_S)
            watch.kill()
        assert (tmp_path / "w" / "current" / "version.json").is_file()
        sglang.blocked.clear()
        with started(url, tmp_path / "w", *options) as watch:
            assert watch.wait() == 0
        with started(url, tmp_path / "w", *options) as watch:
            assert watch.wait() == 0
            assert list(watch.lines) == []

    assert sglang.labels() == [version.id, version.id]


def test_killed_in_a_download_resumes_it_and_leaves_the_older_version_linked(
    served: Served, url: str, tmp_path: Path
) -> None:
    first = served.publish("digits", 100).versions[0]
    with recording(url) as proxy:
        with started(proxy.url, tmp_path / "w") as watch:
            watch.wait_line(lambda line: first.id[:12] in line)
            proxy.break_after, proxy.holds = 1_000_000, True
            second = served.publish("digits", 200, size=200_000).versions[0]  # 3.2 MB
            assert proxy.held.wait(WAIT_S)
            eventually(lambda: _partial(tmp_path / "w"), "a part on the disk", WAIT_S)
            watch.kill()
        assert (tmp_path / "w" / "current").resolve().name == f"step-100-{first.id[:12]}"
        proxy.released.set()
        proxy.requests.clear()
        finish(served, 200)
        with started(proxy.url, tmp_path / "w") as watch:
            assert watch.wait() == 0, list(watch.errors)
        ranges = [each for _, path, each in proxy.requests if path.endswith("model.safetensors")]

    assert len(ranges) == 1
    assert ranges[0] is not None
    assert not ranges[0].startswith("bytes=0-")
    weights = (second.folder / "model.safetensors").read_bytes()
    assert (tmp_path / "w" / "current" / "model.safetensors").read_bytes() == weights


def test_terminated_command_ends_its_child(served: Served, url: str, tmp_path: Path) -> None:
    served.publish("digits", 100)
    pid = tmp_path / "pid"
    program = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    script = tmp_path / "child.py"
    script.write_text(program)

    with started(url, tmp_path / "w", "--cmd", f"{sys.executable} {script}") as watch:
        child = int(eventually(lambda: pid.read_text() if pid.is_file() else "", "the child", 3 * WAIT_S))
        watch.send(signal.SIGTERM)
        assert watch.wait() == 128 + signal.SIGTERM
    eventually(lambda: not Path(f"/proc/{child}").exists(), "the end of the child", WAIT_S)


def _partial(into: Path) -> bool:
    return any(path.stat().st_size > 0 for path in into.glob("step-200-*/.model.safetensors.*.partial"))
