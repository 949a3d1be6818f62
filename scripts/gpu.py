"""Tests and measures this project on the CUDA device of this machine, in at most eight minutes.

    python3 scripts/gpu.py                      the tests marked `gpu`, then the benchmarks; results in gpu-results/
    python3 scripts/gpu.py --gather gpu-bundle  instead: wheels of what they need besides torch, for another machine

The interpreter needs a torch with CUDA. The other packages are taken from wheels in gpu-bundle/ if that is there, so
that a machine without network access can run this. Nothing is installed: the wheels are unpacked into a temporary
folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import xml.etree.ElementTree as ET  # of a file that our own tests have written
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    *("zmq", "numpy", "fastapi", "httptools", "prometheus_client", "uvicorn", "httpx2", "rich", "safetensors", "typer"),
    *("hypothesis", "pytest", "pytest_timeout", "yaml"),
)
_STOPPING_S = 20.0
_EXTRAS = ("trainer", "server", "reader", "fast")
_PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64", "any")
_LOOK = """
import importlib.util, json, sys, torch
found = torch.cuda.is_available()
print(json.dumps({
    "missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None],
    "torch": torch.__version__, "card": torch.cuda.get_device_name() if found else None,
}))
"""


@dataclass(slots=True)
class Part:
    """One command and its share of the time; afterwards, how it ended."""

    name: str
    command: list[str]
    share: float
    outcome: str = ""
    seconds: float = 0.0
    failed: bool = True
    found: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "gpu-results", help="a folder for them")
    parser.add_argument("--wheels", type=Path, default=ROOT / "gpu-bundle", help="a folder of wheels")
    parser.add_argument("--minutes", type=float, default=8.0, help="the most that all of it may take")
    parser.add_argument("--quick", action="store_true", help="benchmarks at smoke sizes: does everything run?")
    parser.add_argument("--gather", type=Path, metavar="FOLDER", help="download wheels into this folder, and end")
    parser.add_argument("--python", default="3.12", help="with --gather: the Python of the other machine")
    parser.add_argument("--without", nargs="*", default=[], help="with --gather: packages that are there already")
    args = parser.parse_args()
    if args.gather is not None:
        gather(args.gather, args.python, args.without)
        return
    with tempfile.TemporaryDirectory(prefix="ema-gpu-") as folder:
        environ = environment(args.wheels, Path(folder))
        about, results = look(environ), args.results.resolve()
        results.mkdir(parents=True, exist_ok=True)
        done = parts(results, quick=args.quick)
        run(done, environ, results, args.minutes * 60)
    write(done, about, results)
    print(f"\nresults: {results}")
    if any(part.failed for part in done):
        sys.exit(1)


def environment(wheels: Path, folder: Path) -> dict[str, str]:
    """The variables of a process that imports this project and what the wheels hold."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if files:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        subprocess.run([*pip, "--no-deps", "--target", str(folder), *files], check=True, timeout=300)
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(ROOT / "proto"), str(ROOT), str(folder), *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def look(environ: dict[str, str]) -> dict[str, str]:
    """Card, driver, versions, date and commit. Ends the program where something is missing."""
    command = [sys.executable, "-c", _LOOK, *MODULES]
    looked = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    if looked.returncode != 0:
        _end(f"torch cannot be imported by {sys.executable}: {looked.stderr.strip().splitlines()[-1]}")
    found = json.loads(looked.stdout.strip().splitlines()[-1])
    if found["missing"]:
        _end(
            f"{sys.executable} lacks {', '.join(found['missing'])}: install '.[all]' and the group test, or take "
            "wheels from gpu-bundle/: `scripts/gpu.py --gather gpu-bundle` downloads them on another machine"
        )
    if found["card"] is None:
        _end(f"torch {found['torch']} finds no CUDA device: a build with CUDA, a driver and a card are needed")
    return {
        "card": found["card"],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": f"Python {platform.python_version()}, torch {found['torch']}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def parts(results: Path, *, quick: bool) -> list[Part]:
    """Tests and benchmarks, in the order of their running."""
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    tests += ["--timeout", "120", f"--junitxml={results / 'tests.xml'}"]
    measured = [
        Part(
            name, [*python, "benchmarks", name, "--json", str(results / f"{name}.json"), *(["--quick"] * quick)], share
        )
        for name, share in (("device", 1.0), ("gpu_step", 3.0))
    ]
    return [Part("tests", tests, 4.0), *measured]


def run(todo: Sequence[Part], environ: dict[str, str], results: Path, seconds: float) -> None:
    """Run the parts one after another. Each gets its share of the time that is left."""
    until = time.monotonic() + seconds
    for index, part in enumerate(todo):
        left = sum(each.share for each in todo[index:])
        limit = max(1.0, (until - time.monotonic()) * part.share / left)
        print(f"\n{part.name}: at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        code = _bounded(part.command, environ, results / f"{part.name}.txt", limit)
        part.seconds = time.monotonic() - started
        part.failed = code != 0
        part.outcome = (
            "ended" if code == 0 else f"stopped after {limit:.0f} s" if code is None else f"exit status {code}"
        )


def write(done: Iterable[Part], about: dict[str, str], results: Path) -> None:
    """One summary as Markdown and one as JSON, of the files that the parts have left."""
    lines = ["# On a GPU", "", *(f"- {name}: {value}" for name, value in about.items())]
    for part in done:
        if part.name == "tests":
            part.found = _tests(results / "tests.xml")
            text = "\n".join(f"- {name}: {value}" for name, value in part.found.items())
        else:
            file = results / f"{part.name}.json"
            part.found = json.loads(file.read_text()) if file.exists() else {}
            text = _table((results / f"{part.name}.txt").read_text())
        lines += ["", f"## {part.name}: {part.outcome}, {part.seconds:.0f} s", "", text or "Nothing was found."]
    summary = {**about, "parts": {part.name: _plain(part) for part in done}}
    (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (results / "summary.md").write_text("\n".join(lines) + "\n")


def gather(folder: Path, python: str, without: Sequence[str]) -> None:
    """Download wheels for Linux on x86-64 of what the tests and benchmarks import besides torch, and build our own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [each for extra in _EXTRAS for each in extras[extra]] + project["dependency-groups"]["test"]
    wanted = [each for each in wanted if not each.startswith(("torch", "ema-sidecar"))]
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--implementation", "cp", "--python-version", python]
    target += [part for abi in (f"cp{python.replace('.', '')}", "abi3", "none") for part in ("--abi", abi)]
    target += [part for name in _PLATFORMS for part in ("--platform", name)]
    download = [*pip, "download", "--quiet", "--only-binary=:all:", "--dest", str(folder), *target, *wanted]
    subprocess.run(download, check=True, timeout=1800)
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=600
    )
    left_out = {name.lower().replace("-", "_") for name in without}
    for wheel in folder.glob("*.whl"):
        if wheel.name.partition("-")[0].lower() in left_out:
            wheel.unlink()
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{folder}: {size / 1e6:.0f} MB of wheels. Take this clone with it to the machine that has the GPU.")


def _bounded(command: Sequence[str], environ: dict[str, str], log: Path, limit_s: float) -> int | None:
    """Run a command and show its output; its exit status, or None if it had to be stopped."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with log.open("w") as file:
        reader = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes what it knows
            return None
        finally:
            _stop(process)
            reader.join(_STOPPING_S)
            if not reader.is_alive():
                process.stdout.close()


def _stop(process: subprocess.Popen[str]) -> None:
    """Wait a moment for the end of a command, then kill what is left of it and of the processes that it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOPPING_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_STOPPING_S)


def _copy(stream: IO[str], file: IO[str]) -> None:
    for line in stream:
        sys.stdout.write(line)
        sys.stdout.flush()
        file.write(line)
        file.flush()


def _tests(file: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and which failed."""
    if not file.exists():
        return {}
    cases = list(ET.parse(file).iter("testcase"))  # noqa: S314
    names = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failed = [*names["failure"], *names["error"]]
    found: dict[str, Any] = {
        "passed": len(cases) - len(failed) - len(names["skipped"]),
        "failed": len(failed),
        "skipped": len(names["skipped"]),
    }
    return found | ({"failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed]} if failed else {})


def _table(output: str) -> str:
    """The Markdown that a benchmark has printed: its list of the machine, and its table."""
    lines = [line for line in output.splitlines() if line.startswith(("- ", "|", "On one "))]
    return "\n".join(lines)


def _plain(part: Part) -> dict[str, Any]:
    return {"outcome": part.outcome, "seconds": round(part.seconds, 1), **part.found}


def _output(*command: str) -> str:
    """The first line that a program prints; `unknown` without it."""
    if shutil.which(command[0]) is None:
        return "unknown"
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return ran.stdout.partition("\n")[0].strip() or "unknown"


def _end(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
