"""Writes the description of the HTTP API: `python -m ema_server.http.openapi proto/openapi.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ema_server.http.app import create_api


def document() -> str:
    """The OpenAPI document, as text."""
    return json.dumps(create_api().openapi(), indent=2) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
