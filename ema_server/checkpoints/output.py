"""Writes averages as checkpoints: into a temporary folder, durably, and renamed when all of them are complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.checkpoints.errors import ArgumentError
from ema_server.checkpoints.folders import SUFFIX, Checkpoint, is_step_folder
from ema_server.checkpoints.plan import OutputFile
from ema_server.checkpoints.weights import ORIGIN, Weighing
from ema_server.compute.memory import host_memory
from ema_server.rules.ledger import Ledger
from ema_server.storage.catalog import FileEntry
from ema_server.storage.disk import pwrite_all, sync_folders, write_durably
from ema_server.storage.generation import entry_of
from ema_server.storage.records import GENERATION_FILE, VERSION_FILE, identified, rfc3339
from ema_server.tensors.dtypes import TORCH_DTYPES
from ema_server.tensors.safetensors_file import Stored

KIND = "checkpoints"  # of a derived version

_COMPANIONS = frozenset((".jinja", ".json", ".jsonl", ".md", ".model", ".py", ".tiktoken", ".txt", ".yaml", ".yml"))
_COMPANION_NAMES = frozenset(("LICENSE", "NOTICE"))
_STATE_NAMES = frozenset((VERSION_FILE, GENERATION_FILE, "trainer_state.json", "zero_to_fp32.py"))
_INDEX_ENDING = ".index.json"


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint that was read, with the digests of its files."""

    checkpoint: Checkpoint
    files: tuple[FileEntry, ...]


class AverageWriter:
    """The files of one average, which are written in any order.

    Args:
        folder: receives the files; it exists and is empty.
        files: the files.
    """

    def __init__(self, folder: Path, files: Sequence[OutputFile]) -> None:
        self._places: dict[str, tuple[int, Stored]] = {}
        self._fds: list[int] = []
        try:
            for file in files:
                self._create(folder, file)
        except OSError:
            self.close()
            raise

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write elements of a tensor, 1-D, from number `start` on, in the dtype of the file."""
        fd, stored = self._places[name]
        rounded = values.to(TORCH_DTYPES[stored.dtype])
        pwrite_all(fd, host_memory(rounded.view(torch.uint8)).view, stored.offset + start * ITEM_BYTES[stored.dtype])

    def complete(self) -> None:
        """Make the content of the files durable."""
        for fd in self._fds:
            os.fsync(fd)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _create(self, folder: Path, file: OutputFile) -> None:
        fd = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._fds.append(fd)
        os.truncate(fd, file.nbytes)
        pwrite_all(fd, file.header, 0)
        self._places |= {stored.name: (fd, stored) for stored in file.tensors}


@contextmanager
def replacing(target: Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside `target`, which gets its name at the end of the `with` block. An error deletes it.

    Args:
        target: where the folder will be; an empty folder may be there.
        force: replace a folder that has content.

    Raises:
        ArgumentError: there is something at `target`, or its parent is not a folder.
    """
    check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
        sync_folders([folder])
        _put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # renamed if all went well


def check_target(target: Path, *, force: bool) -> None:
    """Refuse to overwrite what is at `target`, unless it is an empty folder, or a folder and `force` is given.

    Raises:
        ArgumentError: the text says what is there.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArgumentError(f"{target} exists and is not a folder: choose another output")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ArgumentError(f"{target} exists: choose another output, or replace it with --force")


def write_extras(
    folder: Path, newest: Checkpoint, files: Sequence[OutputFile], weighing: Weighing, inputs: Mapping[int, Input]
) -> dict[str, Any]:
    """Write what belongs to an average besides its tensors: index, companion files, and `version.json`.

    Args:
        folder: has the files of the average.
        newest: its index is adapted, and its companion files are copied.
        files: of the average.
        weighing: its checkpoints, by the numbers of `inputs`.
        inputs: the checkpoints that were read.

    Returns:
        The content of `version.json`.
    """
    if newest.index is not None:
        write_durably(folder / newest.index.name, _index(newest.index, files))
    for relative in companions(newest):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        write_durably(folder / relative, (newest.folder / relative).read_bytes())
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = [entry_of(str(path.relative_to(folder)), path) for path in written]
    data = identified(_version(weighing, inputs, entries), rfc3339(time.time()))
    write_durably(folder / VERSION_FILE, data)
    sync_folders([*(path for path in folder.rglob("*") if path.is_dir()), folder])
    record: dict[str, Any] = json.loads(data)
    return record


def companions(checkpoint: Checkpoint) -> list[Path]:
    """Files of a checkpoint besides weights and the state of training, relative to its folder: config, tokenizer, ...

    They are recognised by their endings, in the folder and in its sub-folders.
    """
    if not checkpoint.owns_folder:
        return []
    folder = checkpoint.folder
    inner = [path for path in folder.iterdir() if _is_companion_folder(path)]
    found = [path for each in (folder, *inner) for path in each.iterdir()]
    return sorted(path.relative_to(folder) for path in found if _is_companion(path))


def _is_companion(path: Path) -> bool:
    is_known = path.suffix in _COMPANIONS or path.name in _COMPANION_NAMES
    is_state = path.name in _STATE_NAMES or path.name.endswith(_INDEX_ENDING) or path.name.startswith(".")
    return is_known and not is_state and path.is_file()


def _is_companion_folder(path: Path) -> bool:
    """Whether it is part of this checkpoint, as `additional_chat_templates` is, and not a checkpoint of its own."""
    return (
        path.is_dir()
        and not path.name.startswith(".")
        and not is_step_folder(path)
        and not any(path.glob(f"*{SUFFIX}"))
    )


def _index(source: Path, files: Sequence[OutputFile]) -> bytes:
    """The index of the newest checkpoint, with the sizes of the average."""
    index = json.loads(source.read_bytes())
    metadata = index.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    size = sum(stored.nbytes for file in files for stored in file.tensors)
    return json.dumps({**index, "metadata": {**kept, "total_size": size}}, indent=2).encode() + b"\n"


def _version(weighing: Weighing, inputs: Mapping[int, Input], files: Sequence[FileEntry]) -> dict[str, Any]:
    """The content of `version.json`, in the server's format."""
    ledger, read = Ledger(ORIGIN), []
    for number, share in enumerate(weighing.shares):
        if share:
            one = inputs[number]
            ledger.append(one.checkpoint.step)
            digests = [asdict(entry) for entry in one.files]
            read.append(
                {"path": str(one.checkpoint.path), "step": one.checkpoint.step, "share": share, "files": digests}
            )
    return {
        "average": weighing.name,
        "spec": weighing.spec,
        "step": weighing.steps[weighing.newest],
        "updates": len(read),
        "gap_steps": 0,
        "ledger": ledger.to_json(),
        "derived": {"kind": KIND, "checkpoints": read},
        "files": [asdict(entry) for entry in files],
    }


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`. What is there is kept until the new folder has its name."""
    old = folder.with_name(f"{folder.name}.old") if target.exists() else None
    if old is not None:
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    sync_folders([target.parent])
    if old is not None:
        shutil.rmtree(old)
