"""`python -m trainer_client.timm train.py DATA --model-ema ...`: the arguments of timm's script are passed on."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer_client.errors import EmaClientError
from trainer_client.timm.run import run_script

_USAGE = """usage: python -m trainer_client.timm SCRIPT [ARGUMENT ...]

Runs timm's training script, unmodified, with the averaged model of --model-ema kept by an ema server.

  SCRIPT     timm's train.py
  ARGUMENT   passed on, for example: imagenette2-320 --model resnet34 --model-ema --model-ema-decay 0.99

EMA_ENDPOINT is the server's address for trainers, EMA_URL the one for readers, EMA_RUN the name of the run."""


def main(arguments: list[str]) -> int:
    """Run a script; 2 when that is not possible."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"ema: {script} is no file: give the path of timm's train.py first", file=sys.stderr)
        return 2
    try:
        run_script(script, arguments[1:])
    except EmaClientError as error:
        print(f"ema: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
