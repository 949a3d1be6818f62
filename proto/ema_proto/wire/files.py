"""Companion files of a run (tokenizer, processor, model card): their names, sizes and digests. Bytes are sent apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import FILE_BYTES_MAX, FILES_BYTES_MAX, FILES_MAX
from ema_proto.names import check_file_name
from ema_proto.wire.body import shown, where

_SHA256 = re.compile(r"[0-9a-f]{64}")

SHA256 = where(lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None)


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One companion file; `sha256` in 64 hex digits. `name` may have one folder: `FOLDER/NAME`."""

    name: str
    nbytes: int
    sha256: str


def check_files(files: Iterable[FileSpec]) -> tuple[FileSpec, ...]:
    """Return the files if they can all lie in the folder of one version.

    Raises:
        LocalProtocolError: a name is not allowed, two names differ in case alone or one is the folder of another, or a
            size or their number is over its limit.
    """
    files = tuple(files)
    if len(files) > FILES_MAX:
        raise LocalProtocolError(f"{len(files)} files are over the limit of {FILES_MAX}")
    taken: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for file in files:
        check_file_name(file.name)
        if not 0 <= file.nbytes <= FILE_BYTES_MAX:
            raise LocalProtocolError(f"file {file.name!r} has {file.nbytes} bytes, over the limit of {FILE_BYTES_MAX}")
        if sizes.setdefault(file.sha256, file.nbytes) != file.nbytes:
            raise LocalProtocolError(f"file {file.name!r} has the sha256 of a file of another size")
        if file.name.lower() in taken:
            raise LocalProtocolError(f"file {file.name!r} has the name of another: {taken[file.name.lower()]!r}")
        taken[file.name.lower()] = file.name
    for file in files:
        folder, separator, _ = file.name.lower().partition("/")
        if separator and folder in taken:
            raise LocalProtocolError(f"file {file.name!r} is in a folder with the name of a file: {taken[folder]!r}")
    total = sum(file.nbytes for file in files)
    if total > FILES_BYTES_MAX:
        raise LocalProtocolError(f"the files have {total} bytes, over the limit of {FILES_BYTES_MAX} in all")
    return files


def to_json(files: Iterable[FileSpec]) -> list[dict[str, Any]]:
    """The files as JSON values."""
    return [{"name": file.name, "bytes": file.nbytes, "sha256": file.sha256} for file in files]


def from_json(value: object) -> tuple[FileSpec, ...]:
    """Read what `to_json` wrote.

    Raises:
        RemoteProtocolError: `bad_message`; it is something else, or files that `check_files` refuses.
    """
    if not isinstance(value, list) or len(value) > FILES_MAX:
        raise _bad(f"'files' is {shown(value)}, not a list of at most {FILES_MAX} files")
    try:
        return check_files(_file(item) for item in value)
    except LocalProtocolError as error:
        raise _bad(str(error)) from None


def by_digest(files: Sequence[FileSpec], digests: Iterable[str]) -> tuple[int, ...]:
    """For each digest, the place in `files` of the first file with this content.

    Raises:
        RemoteProtocolError: `bad_message`; no file has it.
    """
    places: dict[str, int] = {}
    for place, file in enumerate(files):
        places.setdefault(file.sha256, place)
    try:
        return tuple(places[digest] for digest in digests)
    except KeyError as error:
        raise _bad(f"no file has the sha256 {error.args[0]}") from None


def _file(item: object) -> FileSpec:
    if not isinstance(item, Mapping):
        raise _bad(f"{shown(item)} is not a file: name, bytes and sha256")
    name, nbytes, sha256 = item.get("name"), item.get("bytes"), item.get("sha256")
    if not isinstance(name, str) or type(nbytes) is not int or not isinstance(sha256, str):
        raise _bad(f"{shown(dict(item))} is not a file: name, bytes and sha256")
    if not _SHA256.fullmatch(sha256):
        raise _bad(f"file {shown(name)} has a sha256 that is not 64 hex digits in lower case")
    return FileSpec(name, nbytes, sha256)


def _bad(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(RejectCode.BAD_MESSAGE, text)
