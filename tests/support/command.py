"""Runs `ema` as a user does: in a separate process, with a timeout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WAIT_S = 60.0


def ema(*arguments: str, missing: Sequence[str] = (), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `ema` with `arguments`, in an interpreter where the packages in `missing` are not installed."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({list(missing)!r})); sys.argv[0] = 'ema'"
    program = f"{hide}; from ema_cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"},
        check=False,
    )
