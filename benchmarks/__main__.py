"""`python -m benchmarks [NAME ...]`: measure, and print Markdown. `--write` puts it into README.md beside this file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import download, ingest, kernel, machine, memory, step_time
from benchmarks.result import Section

BENCHMARKS: dict[str, Callable[..., Section]] = {
    "step_time": step_time.measure,
    "ingest": ingest.measure,
    "kernel": kernel.measure,
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
    text = report(args.names or list(BENCHMARKS), quick=args.quick)
    print(text)
    if args.write:
        write(text)


def write(text: str) -> None:
    """Put `text` between the two marks in README.md."""
    README.write_text(_MARKED.sub(lambda _: f"\n{text}\n\n", README.read_text()))


def report(names: list[str], *, quick: bool) -> str:
    """The machine, then a table for each benchmark."""
    parts = [machine.description(quick=quick)]
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        parts.append(BENCHMARKS[name](quick=quick).markdown())
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
