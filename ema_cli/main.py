"""Entry point of `ema`. Comes in: the command line; goes out: an exit code.

Nothing but the standard library is imported until a command runs, so that a missing extra is one line of advice and
not a traceback. Knows which extra brings which package; knows nothing of what the commands do.
"""

from __future__ import annotations

import sys

_EXTRA_OF = {
    "fastapi": "server",
    "httpx2": "reader",
    "numpy": "server",
    "prometheus_client": "server",
    "rich": "reader",
    "safetensors": "reader",
    "sklearn": "demo",
    "typer": "reader",
    "uvicorn": "server",
    "zmq": "server",
}
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    try:
        from ema_cli.app import build, run

        sys.exit(run(build()))
    except ModuleNotFoundError as error:
        advice = missing_advice(error)
        if advice is None:
            raise
        print(f"ema: {advice}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:  # while modules are imported; a command that runs has ended by itself
        sys.exit(EXIT_INTERRUPTED)


def missing_advice(error: ModuleNotFoundError) -> str | None:
    """Say which extra brings the module that is missing; None when it is none of an extra's (a fault of ours)."""
    package = (error.name or "").partition(".")[0]
    if package == "torch":
        return "this command needs torch, which is not installed: install the build made for this machine"
    extra = _EXTRA_OF.get(package)
    if extra is None:
        return None
    return f"this command needs {package}, which is not installed: pip install 'ema-sidecar[{extra}]'"
