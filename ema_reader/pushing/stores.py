"""Where `ema push` puts files: a file system of fsspec, or a repository of the Hugging Face Hub.

Both are imported when they are used. Every error of theirs becomes a `ReaderError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ema_reader.errors import ReaderError, UsageError

LAST = "version.json"  # written after all other files: a folder that has it is complete
_HUB = "hf://"
_CONFLICT = 409
# Of stores without folders, in which making one would make a bucket whose name may be a typing error.
_BUCKET_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss"})


class Store(Protocol):
    """A place for one version."""

    address: str

    def previous(self) -> bytes | None:
        """The `version.json` there, None if there is none."""

    def put(self, folder: Path, names: Sequence[str], stale: Sequence[str], step: int, message: str) -> None:
        """Copy the files of these names, and delete the stale ones."""


class FileStore:
    """A folder of a file system of fsspec: `file://`, `s3://`, `gs://`, `memory://`, or a path.

    Raises:
        UsageError: fsspec does not know the address, or the package for it is missing.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.address = url
        try:
            self._fs: Any
            self._root: str
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url!r} cannot be used: {error}") from None
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        self._has_buckets = not _BUCKET_PROTOCOLS.isdisjoint(protocols)

    def previous(self) -> bytes | None:
        with _store_errors(self.address):
            try:
                return bytes(self._fs.cat_file(self._path(LAST)))
            except FileNotFoundError:
                return None

    def put(self, folder: Path, names: Sequence[str], stale: Sequence[str], step: int, message: str) -> None:
        """Copy the files. `version.json` is deleted first and comes last."""
        with _store_errors(self.address):
            for name in (LAST, *stale):
                if self._fs.exists(self._path(name)):
                    self._fs.rm_file(self._path(name))
            for name in sorted(names, key=lambda name: name == LAST):
                path, size = self._path(name), (folder / name).stat().st_size
                if not self._has_buckets:
                    self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(folder / name), path)
                if self._fs.info(path)["size"] != size:
                    raise ReaderError(
                        f"{self.address}/{name} does not have the {size} bytes that were written: try again"
                    )

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class HubStore:
    """A model repository of the Hugging Face Hub, made if it is missing. A version is one commit with a tag `step-N`.

    Args:
        url: `hf://OWNER/NAME`.
        public: whether a repository that is made is public.
        own_endpoint: the address of the ema server, which is not the Hub.

    Raises:
        UsageError: the address has another form, or `HF_ENDPOINT` leads to the ema server.
    """

    def __init__(self, url: str, *, public: bool, own_endpoint: str) -> None:
        import huggingface_hub

        self._hub: Any = huggingface_hub
        self._api: Any = huggingface_hub.HfApi()
        self._repo = url.removeprefix(_HUB).strip("/")
        self._public = public
        if self._repo.count("/") != 1 or "@" in self._repo:
            raise UsageError(f"{url!r} is not hf://OWNER/NAME")
        if str(self._api.endpoint).rstrip("/") == own_endpoint.rstrip("/"):
            raise UsageError(f"HF_ENDPOINT is {own_endpoint}, the ema server: unset it to push to the Hugging Face Hub")
        self.address = f"{self._api.endpoint}/{self._repo}"

    def previous(self) -> bytes | None:
        with _store_errors(self.address):
            try:
                return Path(self._api.hf_hub_download(self._repo, LAST)).read_bytes()
            except (self._hub.errors.EntryNotFoundError, self._hub.errors.RepositoryNotFoundError):
                return None

    def put(self, folder: Path, names: Sequence[str], stale: Sequence[str], step: int, message: str) -> None:
        with _store_errors(self.address):
            self._api.create_repo(self._repo, private=not self._public, exist_ok=True)
            commit = self._api.upload_folder(
                repo_id=self._repo,
                folder_path=folder,
                allow_patterns=list(names),
                delete_patterns=list(stale) or None,
                commit_message=message,
            )
            self._tag(f"step-{step}", commit.oid)

    def _tag(self, tag: str, commit: str) -> None:
        """Have the tag name the commit, also if it named another one."""
        try:
            self._api.create_tag(self._repo, tag=tag, revision=commit)
        except self._hub.errors.HfHubHTTPError as error:
            if error.response.status_code != _CONFLICT:
                raise
            self._api.delete_tag(self._repo, tag=tag)
            self._api.create_tag(self._repo, tag=tag, revision=commit)


def open_store(url: str, *, public: bool, own_endpoint: str) -> Store:
    """The store at an address.

    Raises:
        UsageError: it cannot be used.
        ModuleNotFoundError: fsspec or huggingface_hub is not installed.
    """
    if url.startswith(_HUB):
        return HubStore(url, public=public, own_endpoint=own_endpoint)
    return FileStore(url)


@contextmanager
def _store_errors(address: str) -> Iterator[None]:
    try:
        yield
    except ReaderError:
        raise
    except Exception as error:  # the stores of fsspec share no class of errors
        text = " ".join(str(error).split()) or type(error).__name__
        raise ReaderError(f"{address}: {text}") from error
