"""Companion files: which names, sizes and lists are allowed."""

from __future__ import annotations

import pytest

from ema_proto import limits
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.names import OWN_FILES, check_file_name
from ema_proto.wire.files import FileSpec, by_digest, check_files, from_json, to_json

A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "README.md",
        "spiece.model",
        "1_Pooling/config.json",
        "additional_chat_templates/tool_use.jinja",
        "x",
        "console.txt",
        "a" * limits.FILE_NAME_CHARS_MAX,
    ],
)
def test_names_of_files_that_libraries_write_are_allowed(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "../up",
        "a/../b",
        "/etc/passwd",
        "a/",
        "a//b",
        "a/b/c",
        "a\\b",
        "a\nb",
        "a\0b",
        "a b",
        "ends.",
        "folder./x",
        "größe.txt",
        "-option",
        "CON",
        "con.txt",
        "a/LPT1.json",
        "C:x",
        "a" * (limits.FILE_NAME_CHARS_MAX + 1),
        *sorted(OWN_FILES),
        "Config.JSON",
        "model.safetensors/x",
    ],
)
def test_names_that_could_leave_the_folder_or_hide_a_file_are_refused(name: str) -> None:
    with pytest.raises(LocalProtocolError, match="file name"):
        check_file_name(name)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([FileSpec("a", 1, A), FileSpec("A", 1, B)], "name of another"),
        ([FileSpec("a", 1, A), FileSpec("a", 1, A)], "name of another"),
        ([FileSpec("a/b", 1, A), FileSpec("A", 1, B)], "folder with the name of a file"),
        ([FileSpec("a", -1, A)], "over the limit"),
        ([FileSpec("a", limits.FILE_BYTES_MAX + 1, A)], "over the limit"),
        ([FileSpec("a", 1, A), FileSpec("b", 2, A)], "of another size"),
        ([FileSpec(str(i), limits.FILE_BYTES_MAX, f"{i:064x}") for i in range(5)], "in all"),
        ([FileSpec(str(i), 1, A) for i in range(limits.FILES_MAX + 1)], "over the limit"),
    ],
)
def test_lists_that_do_not_fit_one_folder_are_refused(files: list[FileSpec], text: str) -> None:
    with pytest.raises(LocalProtocolError, match=text):
        check_files(files)


def test_files_of_the_largest_sizes_are_read_as_written() -> None:
    files = tuple(FileSpec(f"d/{i}", limits.FILE_BYTES_MAX, f"{i:064x}") for i in range(4))

    assert from_json(to_json(files)) == files


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [1],
        [{}],
        [{"name": "a", "bytes": True, "sha256": A}],
        [{"name": "a", "bytes": 1.0, "sha256": A}],
        [{"name": "a", "bytes": 1, "sha256": A.upper()}],
        [{"name": "a", "bytes": 1, "sha256": "a"}],
        [{"name": "../a", "bytes": 1, "sha256": A}],
        [{"name": "a", "bytes": 1, "sha256": A}] * (limits.FILES_MAX + 1),
    ],
)
def test_what_is_no_list_of_files_is_a_bad_message(value: object) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        from_json(value)

    assert caught.value.code is RejectCode.BAD_MESSAGE


def test_a_digest_stands_for_the_first_file_that_has_it() -> None:
    files = (FileSpec("a", 1, A), FileSpec("b", 1, A), FileSpec("c", 2, B))

    assert by_digest(files, [B, A]) == (2, 0)
    with pytest.raises(RemoteProtocolError):
        by_digest(files, ["c" * 64])
