"""`python -m benchmarks [NAME ...]`: measure, and print Markdown. `--write` puts it into README.md beside this file."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import device, download, error, gpu_step, ingest, kernel, machine, memory, sharded, step_time, synthesis
from benchmarks.result import Section

BENCHMARKS: dict[str, Callable[..., Section]] = {
    "step_time": step_time.measure,
    "gpu_step": gpu_step.measure,
    "ingest": ingest.measure,
    "sharded": sharded.measure,
    "kernel": kernel.measure,
    "device": device.measure,
    "error": error.measure,
    "synthesis": synthesis.measure,
    "download": download.measure,
    "memory": memory.measure,
}

README = Path(__file__).with_name("README.md")
_MARKED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)


def main() -> None:
    """Run what the command line names, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smoke sizes: does everything run?")
    parser.add_argument("--write", action="store_true", help="replace the tables in benchmarks/README.md")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if args.write and (args.names or args.quick):
        parser.error("--write replaces all tables: run it without names and without --quick")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and trainers are stopped too
    parts: list[str] = []
    for part in report(args.names or list(BENCHMARKS), quick=args.quick):
        print(part, end="\n\n", flush=True)
        parts.append(part)
    if args.write:
        write("\n\n".join(parts))


def write(text: str) -> None:
    """Put `text` between the two marks in README.md."""
    README.write_text(_MARKED.sub(lambda _: f"\n{text}\n\n", README.read_text()))


def report(names: Sequence[str], *, quick: bool) -> Iterator[str]:
    """The machine, then a table for each benchmark, each as soon as it is measured."""
    yield machine.description(quick=quick)
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        yield BENCHMARKS[name](quick=quick).markdown()


if __name__ == "__main__":
    main()
