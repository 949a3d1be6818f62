"""Which process of a distributed training this is. Rank 0 streams; the clients of the others do nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed

from trainer_client.errors import SettingsError


def rank_of(given: int | None, environ: Mapping[str, str]) -> int:
    """The rank: as given, else torch.distributed's once it is initialised, else the launcher's.

    In `environ`, `RANK` counts where `WORLD_SIZE` is more than 1, as torchrun sets them.

    Raises:
        SettingsError: a variable is not a whole number.
    """
    if given is not None:
        return given
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return _number(environ, "RANK", 0) if _number(environ, "WORLD_SIZE", 1) > 1 else 0


def _number(environ: Mapping[str, str], variable: str, default: int) -> int:
    text = environ.get(variable) or str(default)
    if not text.isdecimal():
        raise SettingsError(f"{variable}={text!r} is not a whole number: pass rank=0 if this process is to stream")
    return int(text)
