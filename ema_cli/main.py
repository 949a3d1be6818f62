"""Entry point of `ema`. It imports only the standard library, so that a missing extra is one line and no traceback."""

from __future__ import annotations

import sys

from ema_cli.exits import EXIT_INTERRUPTED, EXIT_USAGE, missing_advice


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    try:
        from ema_cli.app import build, run

        sys.exit(run(build()))
    except ModuleNotFoundError as error:
        advice = missing_advice(error, *sys.argv[1:2])
        if advice is None:
            raise
        print(f"ema: {advice}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:  # during the imports; a running command handles its own interrupts
        sys.exit(EXIT_INTERRUPTED)
