"""Exit codes of `ema`, and the advice for a missing package. Imports only the standard library."""

from __future__ import annotations

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

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


def missing_advice(error: ModuleNotFoundError) -> str | None:
    """How to install the missing module; None if no extra of this project provides it."""
    package = (error.name or "").partition(".")[0]
    if package == "torch":
        return "this command needs torch, which is not installed: install the build made for this machine"
    extra = _EXTRA_OF.get(package)
    if extra is None:
        return None
    return f"this command needs {package}, which is not installed: pip install 'ema-sidecar[{extra}]'"
