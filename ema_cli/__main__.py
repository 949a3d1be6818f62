"""`python -m ema_cli` is `ema`, for processes that must run under this very interpreter."""

from ema_cli.main import main

main()
