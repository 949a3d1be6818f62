"""Which names a path, a URL and a repository id can hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.errors import LocalProtocolError
from ema_proto.names import RESERVED, check_name


@pytest.mark.parametrize("name", ["a", "resnet34", "ema-0.9999", "A_b.C-d", "x" * 96, "0", "_", "v10", "apis"])
def test_valid_name_is_returned_unchanged(name: str) -> None:
    assert check_name("run", name) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        ("x" * 97, "has 97 characters"),
        ("a b", "not allowed"),
        ("a/b", "not allowed"),
        ("größe", "not allowed"),
        ("a\n", "not allowed"),
        ("\u0661", "not allowed"),
        ("\ud800", "not allowed"),
        ("-a", "starts or ends"),
        (".a", "starts or ends"),
        ("a-", "starts or ends"),
        ("a.", "starts or ends"),
        ("a--b", "contains"),
        ("a..b", "contains"),
        *((name, "is reserved") for name in sorted(RESERVED)),
        ("API", "is reserved"),
        ("Docs", "is reserved"),
    ],
)
def test_invalid_name_is_refused_with_kind_name_and_rule(name: str, problem: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        check_name("average", name)
    text = str(caught.value)

    assert text.startswith("average name ")
    assert problem in text
    assert "use 1 to 96 of A-Z a-z 0-9 _ . -" in text
    assert len(text) < 300
    text.encode()


@given(st.text(alphabet="aZ09_.-", min_size=1, max_size=100))
def test_accepted_name_never_leaves_its_folder(name: str) -> None:
    try:
        check_name("run", name)
    except LocalProtocolError:
        return
    assert ".." not in name
    assert name[0] not in ".-"
    assert len(name) <= 96
