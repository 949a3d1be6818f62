"""Exit codes of `ema`, and the advice for a missing package. Imports only the standard library."""

from __future__ import annotations

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_EXTRA_OF = {
    "fastapi": "server",
    "fsspec": "push",
    "httpx2": "reader",
    "huggingface_hub": "push",
    "numpy": "server",
    "prometheus_client": "server",
    "rich": "reader",
    "safetensors": "reader",
    "sklearn": "demo",
    "typer": "reader",
    "uvicorn": "server",
    "zmq": "server",
}


_EXTRA_OF_COMMAND = {
    "average": "server",
    "serve": "server",
    "demo": "demo",
}  # of those that need more than the extra `reader`


def missing_advice(error: ModuleNotFoundError, command: str = "") -> str | None:
    """How to install what a command needs, when a module is missing; None if no extra of this project provides it."""
    package = (error.name or "").partition(".")[0]
    if package == "torch":
        return "this command needs torch, which is not installed: install the build made for this machine"
    extra = _EXTRA_OF.get(package)
    if extra is None:
        return None
    wanted = _EXTRA_OF_COMMAND.get(command, extra)
    return f"this command needs {package}, which is not installed: in a clone of ema-sidecar, pip install '.[{wanted}]'"
