"""Copies a version to a store: its files, verified when they were downloaded, and a model card with its scores."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from ema_reader.pushing.stores import Store
from ema_reader.reader import Reader
from ema_reader.values import Version, files_of

README = "README.md"


def push_version(reader: Reader, version: Version, store: Store) -> tuple[str, ...]:
    """Copy a version to a store; returns the names of the files.

    A `README.md` of the trainer stays; without one a model card is generated. Files of the version that was there
    before, and that this one lacks, are deleted: a tokenizer of another model would be loaded with these weights.

    Raises:
        VerificationFailed: the bytes differ from those that the server wrote; nothing was copied.
        NotFound: the server does not have the version.
        ReaderError: the store refuses; the text says why.
    """
    with tempfile.TemporaryDirectory(prefix="ema-push-") as temporary:
        folder = reader.download(version, Path(temporary) / "version")
        if version.file(README) is None:
            (folder / README).write_text(reader.card(version))
        names = tuple(dict.fromkeys([*(file.name for file in version.files), README]))
        stale = [name for name in _names_in(store.previous()) if name not in names]
        store.put(folder, names, stale, version.step, str(version))
    return names


def _names_in(written: bytes | None) -> tuple[str, ...]:
    """The files that a `version.json` lists; none if it is not one."""
    if written is None:
        return ()
    try:
        return tuple(file.name for file in files_of(json.loads(written)))
    except (ValueError, KeyError, TypeError):
        return ()
