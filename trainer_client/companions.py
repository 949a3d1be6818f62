"""Companion files: read once, when a client is made, and sent to the server when its run is joined.

A folder stands for the files in it and in its subfolders that `from_pretrained` may look for: hidden files, weights and
training state are left out, and so are subfolders that hold weights, which are other models or checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from ema_proto.errors import LocalProtocolError
from ema_proto.limits import CONFIG_BYTES_MAX, FILE_BYTES_MAX, FILES_BYTES_MAX, FILES_MAX
from ema_proto.names import check_file_name
from ema_proto.wire.files import FileSpec, check_files
from trainer_client.errors import SettingsError

log = logging.getLogger("ema")

CONFIG_FILE = "config.json"

_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.npz", "*.distcp"),
)
_TRAINING_STATE = ("trainer_state.json", "events.out.tfevents.*")
_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class CompanionFile:
    """One companion file in memory."""

    spec: FileSpec
    data: bytes

    @classmethod
    def of(cls, name: str, data: bytes) -> CompanionFile:
        """A file of this content."""
        return cls(FileSpec(name, len(data), hashlib.sha256(data).hexdigest()), data)


@dataclass(frozen=True, slots=True)
class Companions:
    """The companion files of a run, and the text of `config.json` if there is one."""

    files: tuple[CompanionFile, ...]
    config: str | None


def read_companions(paths: Iterable[Path], config: str | None) -> Companions:
    """Read files and folders. `config` is the text that was given as `config=`, which goes before a folder's.

    Raises:
        SettingsError: a path cannot be read, a name is not allowed, a limit is exceeded, or `config.json` is given
            twice.
    """
    found: list[tuple[str, Path]] = []
    left_out: list[str] = []
    for path in paths:
        if path.is_dir():
            found += _in_folder(path, left_out)
        elif is_weights(path.name):
            left_out.append(path.name)
        elif path.name == CONFIG_FILE and config is not None:
            raise SettingsError(f"files has {str(path)!r} and config= is given: give one of them")
        else:
            found.append((_checked(path.name), path))
    configs = [path for name, path in found if name == CONFIG_FILE]
    files = _read([(name, path) for name, path in found if name != CONFIG_FILE])
    if configs and config is None:
        config = config_text(configs[0])
    _log(files, left_out)
    return Companions(files, config)


def check_companions(files: Iterable[CompanionFile]) -> tuple[CompanionFile, ...]:
    """Return the files if a run may have them.

    Raises:
        SettingsError: two have one name, or a limit is exceeded.
    """
    files = tuple(files)
    try:
        check_files(file.spec for file in files)
    except LocalProtocolError as error:
        raise SettingsError(f"files cannot be used: {error}") from None
    return files


def config_text(config: Mapping[str, Any] | str | PathLike[str]) -> str:
    """The text of `config.json`, from a dict or the path of a file.

    Raises:
        SettingsError: it cannot be read, is not a JSON object, or is too large.
    """
    try:
        if isinstance(config, Mapping):
            text = json.dumps(dict(config), indent=2, allow_nan=False) + "\n"
        else:
            text = Path(config).read_bytes().decode()  # byte for byte: read_text would change line ends
        value = json.loads(text)
    except OSError as error:
        raise SettingsError(f"config file {str(config)!r} cannot be read: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"config is not JSON: {error}; pass a dict of plain values or the path of a JSON file"
        ) from None
    if not isinstance(value, dict):
        raise SettingsError("config is not a JSON object: pass a dict, or the path of a file that holds one")
    if len(text.encode()) > CONFIG_BYTES_MAX:
        raise SettingsError(f"config has {len(text.encode())} bytes, over the limit of {CONFIG_BYTES_MAX}")
    return text


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights or the state of a training."""
    return any(fnmatchcase(name, pattern) for pattern in (*_WEIGHTS, *_TRAINING_STATE))


def _in_folder(folder: Path, left_out: list[str]) -> Iterator[tuple[str, Path]]:
    """Names and paths of the companion files in a folder; the names of others are appended to `left_out`."""
    for path in _listed(folder):
        if path.is_file():
            if _is_allowed(path.name, path.name):
                yield path.name, path
            else:
                left_out.append(path.name)
            continue
        inner = _listed(path) if path.is_dir() else []
        if any(is_weights(each.name) for each in inner):
            left_out.append(f"{path.name}/")
            continue
        for each in inner:
            name = f"{path.name}/{each.name}"
            if each.is_file() and _is_allowed(each.name, name):
                yield name, each
            else:
                left_out.append(name)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise SettingsError(f"folder {str(folder)!r} cannot be read: {error.strerror}") from None


def _is_allowed(base: str, name: str) -> bool:
    if base.startswith(".") or is_weights(base):
        return False
    try:
        _checked(name)
    except SettingsError:
        return False
    return True


def _checked(name: str) -> str:
    if name == CONFIG_FILE:
        return name
    try:
        return check_file_name(name)
    except LocalProtocolError as error:
        raise SettingsError(f"files cannot have it: {error}") from None


def _read(found: list[tuple[str, Path]]) -> tuple[CompanionFile, ...]:
    if len(found) > FILES_MAX:
        raise SettingsError(f"files has {len(found)} files, over the limit of {FILES_MAX}: give a list of those needed")
    files = []
    total = 0
    for name, path in found:
        try:
            with path.open("rb") as opened:
                data = opened.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise SettingsError(f"file {str(path)!r} cannot be read: {error.strerror}") from None
        total += len(data)
        if len(data) > FILE_BYTES_MAX:
            raise SettingsError(
                f"file {str(path)!r} is over the limit of {FILE_BYTES_MAX} bytes: leave it out of files"
            )
        if total > FILES_BYTES_MAX:
            raise SettingsError(f"files has over {FILES_BYTES_MAX} bytes in all: give a list of those needed")
        files.append(CompanionFile.of(name, data))
    return check_companions(files)


def _log(files: tuple[CompanionFile, ...], left_out: list[str]) -> None:
    text = f"ema: companion files ({len(files)}, of {sum(file.spec.nbytes for file in files)} bytes): "
    text += _shown([file.spec.name for file in files])
    if left_out:
        text += f"; left out, as weights, training state or names that are not allowed: {_shown(left_out)}"
    log.info("%s", text)


def _shown(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return (", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")) or "none"
