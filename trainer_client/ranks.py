"""Which process of a distributed training this is.

Rank 0 streams, and the clients of the others do nothing, unless the model is sharded: then each rank streams its part.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed

from trainer_client.errors import SettingsError

_GANG_KEY = "ema_sidecar_gang"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one process among the ranks that stream a run together.

    `gang` is text that all ranks of one start of the training share; None where there is one rank.
    """

    rank: int = 0
    world: int = 1
    gang: str | None = None


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


def place_of(incarnation: int = 0) -> Place:
    """The place of this process among all ranks of torch.distributed, whose model is sharded.

    The ranks agree on the gang through the store of the process group, without a collective operation: the first one
    writes random text, once for each incarnation: the store of torchrun outlives a restart.

    Raises:
        SettingsError: torch.distributed is not initialised.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise SettingsError("the model is sharded, and torch.distributed is not initialised: call init_process_group()")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world == 1:
        return Place()
    store = torch.distributed.distributed_c10d._get_default_store()
    return Place(rank, world, store.compare_set(f"{_GANG_KEY}_{incarnation}", "", secrets.token_hex(8)).decode())


def _number(environ: Mapping[str, str], variable: str, default: int) -> int:
    text = environ.get(variable) or str(default)
    if not text.isdecimal():
        raise SettingsError(f"{variable}={text!r} is not a whole number: pass rank=0 if this process is to stream")
    return int(text)
