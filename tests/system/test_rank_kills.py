"""Ranks and servers that are killed and stopped at random: each average is a replay of its ledger; nothing is mixed.

`RANK_FAULTS=200` in the environment makes that many faults.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.processes import SUPPORT, Process, ServerProcess
from support.rank_ledgers import check_generations
from support.stamped_ranks import RUN
from support.waiting import eventually

pytestmark = pytest.mark.slow

FAULTS = int(os.environ.get("RANK_FAULTS", "20"))
WORLD = 3
SCRIPT = str(SUPPORT / "stamped_ranks.py")


class Job:
    """The ranks of one training, and its server."""

    def __init__(self, tmp_path: Path, **given: Any) -> None:
        self.data, self.folder = tmp_path / "data", tmp_path / "job"
        self.folder.mkdir()
        self.server = ServerProcess(self.data, "--publish-every-seconds", "0.2")
        arguments = {"endpoint": self.server.zmq, "world": WORLD, "folder": str(self.folder)} | given
        self.ranks = Process(SCRIPT, json.dumps(arguments))

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.ranks.lines)]

    def pids(self) -> list[int]:
        """The ranks of the newest start, once all have joined."""
        joined = [each for each in self.reports() if "incarnation" in each]
        newest = max((each["incarnation"] for each in joined), default=0)
        return [each["pid"] for each in joined if each["incarnation"] == newest]

    def signal_rank(self, rng: random.Random, number: signal.Signals) -> int:
        eventually(lambda: len(self.pids()) == WORLD, "all ranks have joined")
        pid = rng.choice(self.pids())
        os.kill(pid, number)
        return pid

    def restart_server(self, pause_s: float) -> None:
        with self.server:
            self.server.kill()
        check_generations(self.data)
        time.sleep(pause_s)
        options = {"zmq": self.server.zmq, "http": self.server.http_address}
        self.server = ServerProcess(self.data, "--publish-every-seconds", "0.2", **options)

    def wait_for_steps(self, count: int = 2) -> None:
        """Wait until the server has applied more steps."""
        seen: set[int | None] = set()

        def advanced() -> bool:
            assert self.ranks.popen.poll() is None, "\n".join(list(self.ranks.errors)[-40:])
            runs = {run["run"]: run for run in self.server.get("/v1/runs")["runs"]}
            if RUN in runs:
                seen.add(runs[RUN]["step"])
            return len(seen) > count

        eventually(advanced, "steps are applied", timeout_s=90.0)

    def end(self) -> list[dict[str, Any]]:
        """Have all ranks finish at the same step; returns what they report."""
        ahead = max(int(path.read_text() or 0) for path in self.folder.glob("step-*"))
        (self.folder / "end.new").write_text(str(ahead + 100))
        (self.folder / "end.new").rename(self.folder / "end")
        assert self.ranks.wait(120.0) == 0, "\n".join(list(self.ranks.errors)[-40:])
        return [each for each in self.reports() if "done" in each]


@pytest.mark.timeout(120 + 30 * FAULTS)
def test_kills_and_stops_of_ranks_and_server_leave_a_replay_of_the_ledger(tmp_path: Path) -> None:
    rng = random.Random(31)
    job = Job(tmp_path)
    with job.ranks:
        eventually((job.folder / "checkpoint").exists, "the first checkpoint")
        stopped = set()
        for number in range(FAULTS):
            time.sleep(rng.uniform(0.0, 0.3))
            fault = rng.choice(["kill", "stop", "server", "both"])
            if fault == "stop":
                pid = job.signal_rank(rng, signal.SIGSTOP)
                stopped.add(pid)
                time.sleep(15.0 if number == 1 else rng.uniform(0.1, 1.0))
                os.kill(pid, signal.SIGCONT)
            if fault in ("kill", "both"):
                job.signal_rank(rng, signal.SIGKILL)
            if fault in ("server", "both"):
                job.restart_server(rng.uniform(0.0, 0.5))
            job.wait_for_steps()
        done = job.end()
        assert [each["done"] for each in done] == [True] * WORLD, done
        slow = [each for each in job.reports() if "slow" in each and each["pid"] not in stopped]
        assert not slow
        assert not any("Traceback" in line for line in job.ranks.errors), list(job.ranks.errors)
    with job.server:
        steps = check_generations(job.data)
        assert steps
        assert job.server.get(f"/v1/runs/{RUN}")["state"] == "finished"


@pytest.mark.timeout(120)
def test_rank_that_is_stopped_for_long_costs_gaps_only(tmp_path: Path) -> None:
    rng = random.Random(1)
    job = Job(tmp_path)
    with job.ranks:
        eventually((job.folder / "checkpoint").exists, "the first checkpoint")
        pid = job.signal_rank(rng, signal.SIGSTOP)
        time.sleep(15.0)
        os.kill(pid, signal.SIGCONT)
        job.wait_for_steps(10)
        done = job.end()
        assert [each["done"] for each in done] == [True] * WORLD, (done, list(job.ranks.errors))
        assert [each for each in job.reports() if each.get("incarnation")] == [], "no rank was restarted"
        assert not [each for each in job.reports() if "slow" in each and each["pid"] != pid]
    with job.server:
        steps = check_generations(job.data)
        assert max(after - before for before, after in itertools.pairwise(steps)) > 100


@pytest.mark.timeout(240)
@pytest.mark.skipif(
    "TORCHRUN_RESTARTS" not in os.environ,
    reason="TORCHRUN_RESTARTS is not set: torchrun's ranks sometimes hang after a restart, before a client is made",
)
def test_torchrun_restarts_the_ranks_after_a_kill_and_the_run_continues(tmp_path: Path) -> None:
    folder, data = tmp_path / "job", tmp_path / "data"
    folder.mkdir()
    (folder / "end").write_text("60")
    with ServerProcess(data) as server:
        given = {"endpoint": server.zmq, "folder": str(folder), "kill": [1, 33]}
        # A restart fails, and is repeated, if gloo reads the addresses of the killed ranks: torchrun keeps its store.
        options = ("--nproc-per-node", "2", "--max-restarts", "10", "--rdzv-backend", "c10d")
        command = ("-m", "torch.distributed.run", *options, "--rdzv-endpoint", "127.0.0.1:0", SCRIPT, json.dumps(given))
        with Process(*command) as torchrun:
            assert torchrun.wait(200.0) == 0, "\n".join(list(torchrun.errors)[:60])
            reports = [json.loads(line) for line in torchrun.lines if line.startswith("{")]
        started = [each for each in reports if "gang" in each]
        starts = {each["incarnation"]: each["gang"] for each in started}
        assert len(starts) >= 2
        assert len(set(starts.values())) == len(starts), "each start is a gang of its own"
        assert all(each["gang"] == starts[each["incarnation"]] for each in started), "which its ranks share"
        assert [each["done"] for each in reports if "done" in each] == [True, True]
        assert [run["run"] for run in server.get("/v1/runs")["runs"]] == [RUN], "no run was set aside"
    steps = check_generations(data)
    assert steps[0] == 1
    assert steps[-1] == 60
