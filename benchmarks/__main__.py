"""`python -m benchmarks [NAME ...]`: measure, and print Markdown. `--write` puts it into README.md beside this file.

`--json FILE` also writes what is measured as JSON, after each benchmark.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import (
    device,
    download,
    error,
    gpu_step,
    ingest,
    kernel,
    machine,
    memory,
    sharded,
    shared,
    small_tensors,
    step_time,
    synthesis,
)
from benchmarks.result import Section

BENCHMARKS: dict[str, Callable[..., Section]] = {
    "step_time": step_time.measure,
    "gpu_step": gpu_step.measure,
    "ingest": ingest.measure,
    "shared": shared.measure,
    "sharded": sharded.measure,
    "small_tensors": small_tensors.measure,
    "kernel": kernel.measure,
    "device": device.measure,
    "error": error.measure,
    "synthesis": synthesis.measure,
    "download": download.measure,
    "memory": memory.measure,
}

GPU_BENCHMARKS = ("gpu_step", "device")

README = Path(__file__).with_name("README.md")


def main() -> None:
    """Run what the command line names, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smoke sizes: does everything run?")
    parser.add_argument("--write", action="store_true", help="replace the tables in benchmarks/README.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    chosen = [(mark, names) for mark, names in regions() if not args.names or set(args.names) == set(names)]
    if args.write and (args.quick or args.json or not chosen):
        gpu = " ".join(GPU_BENCHMARKS)
        parser.error(f"--write replaces all tables, or where a GPU is those of `{gpu}`: without --quick and --json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and trainers are stopped too
    if not args.write:
        printed(report(args.names or list(BENCHMARKS), quick=args.quick, json_file=args.json))
        return
    for mark, names in chosen:
        write(printed(report(names, quick=False)), mark)


def regions() -> Iterator[tuple[str, list[str]]]:
    """Each mark in README.md with the benchmarks behind it; those of a GPU only where there is one."""
    yield "measured", [name for name in BENCHMARKS if name not in GPU_BENCHMARKS]
    if torch.cuda.is_available():
        yield "measured on a GPU", list(GPU_BENCHMARKS)


def write(text: str, mark: str) -> None:
    """Put `text` between this mark and the next `<!-- end -->` in README.md."""
    marked = re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    README.write_text(marked.sub(lambda _: f"\n{text}\n\n", README.read_text(), count=1))


def printed(parts: Iterator[str]) -> str:
    """Print each part as soon as it is there; all of them as one text."""
    shown = []
    for part in parts:
        print(part, end="\n\n", flush=True)
        shown.append(part)
    return "\n\n".join(shown)


def report(names: Sequence[str], *, quick: bool, json_file: Path | None = None) -> Iterator[str]:
    """The machine, then a table for each benchmark, each as soon as it is measured."""
    yield machine.description(quick=quick)
    facts, found = machine.facts(), dict[str, object]()
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        section = BENCHMARKS[name](quick=quick)
        found[name] = asdict(section)
        if json_file is not None:
            json_file.write_text(json.dumps({**facts, "quick": quick, "benchmarks": found}, indent=1) + "\n")
        yield section.markdown()


if __name__ == "__main__":
    main()
