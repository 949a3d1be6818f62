"""Two ranks and a server on hosts of their own (network namespaces), whose links delay, lose packets, and are cut."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from support.network_hosts import ADDRESS, Hosts, are_possible
from support.processes import SUPPORT, Process
from support.rank_ledgers import check_generations
from support.waiting import eventually

pytestmark = pytest.mark.slow

_TOKEN = {"EMA_TOKEN": "between-these-hosts-only"}
CUT_S = 20.0


def _serve(host: str, data: Path) -> Process:
    listen = ("--zmq", f"tcp://{ADDRESS}:5555", "--http", "127.0.0.1:0", "--publish-every-seconds", "0.2")
    options = ("ema_cli", "serve", *listen, "--data", str(data))
    return Process(str(SUPPORT / "in_namespace.py"), host, *options, env=_TOKEN)


@pytest.mark.timeout(240)
def test_links_that_fail_cost_gaps_only(tmp_path: Path) -> None:
    if not are_possible():
        pytest.skip("needs root, ip and tc")
    data, folder = tmp_path / "data", tmp_path / "job"
    folder.mkdir()
    given: dict[str, Any] = {"endpoint": f"tcp://{ADDRESS}:5555", "world": 2, "folder": str(folder)}
    with Hosts(2) as hosts, _serve(hosts.server, data) as server:
        server.wait_line(lambda line: line.startswith("{"))
        arguments = json.dumps(given | {"namespaces": hosts.names})
        with Process(str(SUPPORT / "stamped_ranks.py"), arguments, env=_TOKEN) as ranks:
            _wait_for_checkpoint(folder, ranks)
            hosts.narrow(0)
            hosts.narrow(1)
            _wait_for_checkpoint(folder, ranks)
            hosts.set_link(1, "down")
            time.sleep(CUT_S)
            hosts.set_link(1, "up")
            _wait_for_checkpoint(folder, ranks)
            hosts.mute(0)
            time.sleep(CUT_S)
            hosts.unmute(0)
            hosts.widen(0)
            hosts.widen(1)
            _wait_for_checkpoint(folder, ranks)
            ahead = max(int(path.read_text() or 0) for path in folder.glob("step-*"))
            (folder / "end.new").write_text(str(ahead + 100))
            (folder / "end.new").rename(folder / "end")
            assert ranks.wait(60.0) == 0, "\n".join(list(ranks.errors)[-40:])
            reports = [json.loads(line) for line in ranks.lines]
            assert not any("Traceback" in line for line in ranks.errors)
    assert [each["done"] for each in reports if "done" in each] == [True, True]
    assert not [each for each in reports if each.get("incarnation")], "no rank was restarted"
    assert not [each for each in reports if "slow" in each]
    steps = check_generations(data)
    assert steps[0] == 1
    assert len(steps) > 60


def _wait_for_checkpoint(folder: Path, ranks: Process) -> None:
    """Wait for another checkpoint, which needs a generation with that step."""
    before = _checkpoint(folder)

    def is_newer() -> bool:
        assert ranks.popen.poll() is None, "\n".join(list(ranks.errors)[-40:])
        return _checkpoint(folder) > before

    eventually(is_newer, "another checkpoint", timeout_s=60.0)


def _checkpoint(folder: Path) -> int:
    path = folder / "checkpoint"
    return int(path.read_text()) if path.exists() else 0
