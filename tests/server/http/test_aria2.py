"""aria2 resumes through an alias without If-Range: it finds out by the Digest header that the alias has moved."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.served import WAIT_S, Served

pytestmark = [pytest.mark.process, pytest.mark.skipif(shutil.which("aria2c") is None, reason="needs aria2")]

FILE = "v1/runs/digits/averages/ema-0.9/versions/latest/files/model.safetensors"
CHECKSUM_ERROR = 32


def aria2(target: Path, url: str, *options: str) -> subprocess.Popen[bytes]:
    place = ("--dir", str(target.parent), "--out", target.name, "--no-conf", "--no-netrc", "--all-proxy=")
    return subprocess.Popen(
        ["aria2c", "--quiet", "--continue", *place, *options, f"{url}/{FILE}"], stdout=subprocess.DEVNULL
    )


def download_a_part(target: Path, url: str) -> None:
    begun = aria2(target, url, "--max-download-limit=400K", "--file-allocation=none")
    deadline = time.monotonic() + WAIT_S
    while not (target.exists() and target.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    begun.wait(WAIT_S)


def content(served: Served) -> bytes:
    version = served.catalog.versions("digits", "ema-0.9")[0]
    return (version.folder / "model.safetensors").read_bytes()


def test_resumed_download_is_the_file(served: Served, url: str, tmp_path: Path) -> None:
    served.publish("digits", 100, size=400_000)
    download_a_part(tmp_path / "model", url)

    assert 0 < (tmp_path / "model").stat().st_size < len(content(served))
    assert aria2(tmp_path / "model", url).wait(WAIT_S) == 0
    assert (tmp_path / "model").read_bytes() == content(served)


def test_parts_of_two_versions_are_reported_and_repaired(served: Served, url: str, tmp_path: Path) -> None:
    served.publish("digits", 100, size=400_000)
    download_a_part(tmp_path / "model", url)
    served.publish("digits", 200, size=400_000)

    assert aria2(tmp_path / "model", url).wait(WAIT_S) == CHECKSUM_ERROR
    assert aria2(tmp_path / "model", url).wait(WAIT_S) == 0
    assert (tmp_path / "model").read_bytes() == content(served)
