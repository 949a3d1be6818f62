"""Companion files over HTTP: listed, served and downloaded like the others, into folders too."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from ema_reader import Reader
from ema_reader.values import Version
from support.served import Served

FILES = {
    "tokenizer.json": b'{"version": "1.0"}',
    "README.md": b"# A model\n",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "empty.txt": b"",
}


@pytest.fixture
def version(served: Served, reader: Reader) -> Version:
    generation = served.publish("digits", 100, size=20_000, companions=FILES)
    model = (generation.versions[0].folder / "model.safetensors").read_bytes()
    served.publish("digits", 200, size=20_000, companions={**FILES, "copies/tokenizer.json": FILES["tokenizer.json"]})
    assert len(model) > 100_000
    return reader.version("digits", "ema-0.9")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_downloaded_to_its_place(reader: Reader, version: Version, tmp_path: Path) -> None:
    folder = reader.download(version, tmp_path / "out")

    found = content(folder)
    assert set(found) == {file.name for file in version.files}
    assert {name: found[name] for name in FILES} == FILES
    assert found["copies/tokenizer.json"] == FILES["tokenizer.json"]
    assert (folder / "copies" / "tokenizer.json").samefile(folder / "tokenizer.json"), "the same bytes come once"


def test_a_download_over_another_version_replaces_its_files(reader: Reader, version: Version, tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "tokenizer.json").write_text("older")
    (tmp_path / "tokenizer.json").hardlink_to(tmp_path / "copies" / "tokenizer.json")

    for _ in range(2):
        reader.download(version, tmp_path)

        found = content(tmp_path)
        assert found["tokenizer.json"] == found["copies/tokenizer.json"] == FILES["tokenizer.json"]
        assert set(found) == {file.name for file in version.files}


def test_a_download_over_a_version_with_more_files_removes_those_that_are_unchanged(
    served: Served, reader: Reader, version: Version, tmp_path: Path
) -> None:
    served.publish("letters", 100, size=20_000)
    reader.download(version, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")

    reader.download(other := reader.version("letters", "ema-0.9"), tmp_path)

    assert set(content(tmp_path)) == {file.name for file in other.files} | {"README.md", "notes.txt"}


def test_load_reads_the_weights_alone(reader: Reader, version: Version) -> None:
    assert set(reader.load(version)) == {"weight", "bias"}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_has_its_size_digest_and_ranges(url: str, version: Version, name: str) -> None:
    entry = version.file(name)
    assert entry is not None
    address = f"{url}/v1/runs/digits/averages/ema-0.9/versions/{version.id}/files/{name}"

    whole = httpx2.get(address)

    assert (whole.status_code, whole.content) == (200, FILES[name])
    assert whole.headers["etag"] == f'"{entry.sha256}"'
    assert httpx2.head(address).headers["content-length"] == str(entry.size) == str(len(FILES[name]))
    assert httpx2.get(address, headers={"If-None-Match": f'"{entry.sha256}"'}).status_code == 304
    if entry.size:
        part = httpx2.get(address, headers={"Range": "bytes=2-4"})
        assert (part.status_code, part.content) == (206, FILES[name][2:5])


def test_an_alias_redirects_to_the_file_in_its_folder(url: str, version: Version) -> None:
    name = "additional_chat_templates/tool_use.jinja"
    address = f"{url}/v1/runs/digits/averages/ema-0.9/versions/latest/files/{name}"

    answer = httpx2.get(address, follow_redirects=True)

    assert answer.content == FILES[name]
    assert str(answer.url).endswith(f"/{version.id}/files/{name}")


@pytest.mark.parametrize("name", ["x/y/z", "../tokenizer.json", "copies", "copies/", "copies/missing.json", "%2e%2e"])
def test_other_paths_are_not_found(url: str, version: Version, name: str) -> None:
    address = f"{url}/v1/runs/digits/averages/ema-0.9/versions/{version.id}/files/{name}"

    assert httpx2.get(address).status_code in (404, 405)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", ".bashrc", "a/b/c", "a\\b", "a\0b", "NUL", ""])
def test_a_server_cannot_have_a_download_write_elsewhere(name: str) -> None:
    value = {
        "id": "0" * 40,
        "run": "r",
        "average": "a",
        "spec": "raw",
        "step": 1,
        "updates": 1,
        "gap_steps": 0,
        "created": "2026-01-01T00:00:00Z",
        "derived": None,
        "decay": None,
        "half_life_steps": None,
        "files": [{"name": name, "size": 1, "sha256": "0" * 64}],
    }
    with pytest.raises(ValueError, match="not a plain name"):
        Version.from_json(value)
