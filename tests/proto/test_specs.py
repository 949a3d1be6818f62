"""Averages as values and as strings."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.errors import LocalProtocolError
from ema_proto.specs import Ema, Raw, parse_average, parse_averages

decays = st.floats(0.0, 1.0, exclude_max=True)


@given(decays)
def test_a_decay_survives_its_string_exactly_and_is_never_in_exponent_form(decay: float) -> None:
    average = Ema(decay, name="x")

    assert parse_average(average.spec, name="x") == average
    assert "e" not in average.spec.removeprefix("ema:").lower()


@given(
    decays,
    st.floats(0.0, exclude_min=True, allow_infinity=False, allow_nan=False),
    st.floats(0.0, exclude_min=True, allow_infinity=False, allow_nan=False),
    decays,
    st.integers(0, (1 << 53) - 1),
    st.sampled_from(["average", "copy"]),
)
def test_every_parameter_survives_the_string_exactly(
    decay: float, gamma: float, power: float, least: float, update_after: int, buffers: Literal["average", "copy"]
) -> None:
    warm = Ema(
        decay,
        name="x",
        warmup="timm",
        gamma=gamma,
        power=power,
        min_decay=least,
        update_after=update_after,
        buffers=buffers,
    )
    cold = Ema(decay, name="x", update_after=update_after, buffers=buffers)

    assert parse_average(warm.spec, name="x") == warm
    assert parse_average(cold.spec, name="x") == cold


@given(st.floats(1e-60, 1.0, exclude_max=True))
def test_a_default_name_is_a_name_and_says_the_decay(decay: float) -> None:
    assert float(Ema(decay).name.removeprefix("ema-")) == decay


@pytest.mark.parametrize(
    ("text", "spec", "name"),
    [
        ("ema:0.9999", "ema:0.9999", "ema-0.9999"),
        (" ema:0.90 ", "ema:0.9", "ema-0.9"),
        ("ema:1e-3", "ema:0.001", "ema-0.001"),
        ("ema:0", "ema:0", "ema-0"),
        ("ema:-0.0", "ema:0", "ema-0"),
        ("ema:.5", "ema:0.5", "ema-0.5"),
        ("ema:0.99999999999", "ema:0.99999999999", "ema-0.99999999999"),
        ("raw", "raw", "raw"),
        ("ema:0.9999, warmup=timm", "ema:0.9999,warmup=timm", "ema-0.9999-warmup-timm"),
        ("ema:0.9,buffers=copy,warmup=timm", "ema:0.9,warmup=timm,buffers=copy", "ema-0.9-warmup-timm-buffers-copy"),
        ("ema:0.9,update_after=0100", "ema:0.9,update_after=100", "ema-0.9-update_after-100"),
        (
            "ema:0.9,warmup=timm,min=.5,power=75e-2,gamma=2,update_after=0,buffers=average",
            "ema:0.9,warmup=timm,gamma=2,power=0.75,min=0.5",
            "ema-0.9-warmup-timm-gamma-2-power-0.75-min-0.5",
        ),
    ],
)
def test_a_string_becomes_its_canonical_spec_and_default_name(text: str, spec: str, name: str) -> None:
    average = parse_average(text)

    assert (average.spec, average.name) == (spec, name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", "''"),
        ("ema", "'ema'"),
        ("ema:", "''"),
        ("ema:x", "'x'"),
        ("ema:1", "1.0"),
        ("ema:1.5", "1.5"),
        ("ema:-0.1", "-0.1"),
        ("ema:nan", "'nan'"),
        ("ema:inf", "'inf'"),
        ("ema:0_9", "'0_9'"),
        ("ema:\u0660", "'\u0660'"),
        ("ema:0.9,", "''"),
        ("ema:0.9,swa", "'swa'"),
        ("ema:0.9,warmup", "''"),
        ("ema:0.9,warmup=edm", "'edm'"),
        ("ema:0.9,warmup=timm,warmup=timm", "'warmup=timm' is given twice"),
        ("ema:0.9,gamma=2", "warmup=timm"),
        ("ema:0.9,power=1", "warmup=timm"),
        ("ema:0.9,min=0.5", "warmup=timm"),
        ("ema:0.9,warmup=timm,gamma=0", "0.0"),
        ("ema:0.9,warmup=timm,power=-1", "-1.0"),
        ("ema:0.9,warmup=timm,power=inf", "'inf'"),
        ("ema:0.9,warmup=timm,min=1", "1.0"),
        ("ema:0.9,update_after=1.5", "'1.5'"),
        ("ema:0.9,update_after=-1", "'-1'"),
        ("ema:0.9,update_after=9999999999999999", "9999999999999999"),
        ("ema:0.9,buffers=drop", "'drop'"),
        ("ema:" + "9" * 5000, "inf"),
        ("raw:1", "'raw:1'"),
        ("RAW", "'RAW'"),
        ("swa", "'swa'"),
        ("x" * 5000, "xxxx"),
        ("\ud800", "'\\ud800'"),
    ],
)
def test_a_wrong_string_is_refused_with_its_value_and_an_example(text: str, value: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        parse_average(text)

    assert value in str(caught.value)
    assert (
        "0.9999" in str(caught.value) or "use average or copy" in str(caught.value) or "0 or more" in str(caught.value)
    )
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("decay", [True, "0.9", None])
def test_a_decay_is_a_number(decay: object) -> None:
    with pytest.raises(LocalProtocolError, match="is not a number"):
        Ema(decay)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"gamma": "1"}, {"power": True}, {"min_decay": None}, {"update_after": 1.0}, {"update_after": True}],
    ids=str,
)
def test_a_parameter_is_a_number_of_its_kind(wrong: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError, match="is not a number"):
        Ema(0.9, warmup="timm", **wrong)  # type: ignore[arg-type]


def test_a_comma_that_a_parameter_follows_does_not_end_the_rule() -> None:
    text = "raw,ema:0.9,warmup=timm,min=0.5, ema:0.9, buffers=copy ,ema:0.99"

    assert [average.spec for average in parse_averages(text)] == [
        "raw",
        "ema:0.9,warmup=timm,min=0.5",
        "ema:0.9,buffers=copy",
        "ema:0.99",
    ]


def test_strings_and_values_mix_and_a_comma_separates() -> None:
    assert parse_averages(["raw", Ema(0.5)]) == parse_averages("raw, ema:0.5") == (Raw(), Ema(0.5))


@pytest.mark.parametrize(
    ("given_averages", "text"),
    [
        ([], "1 to 64 averages, 0 were given"),
        ([Ema(0.5, name=f"a{i}") for i in range(65)], "1 to 64 averages, 65"),
        (["raw", "raw"], "two averages are named 'raw': give one of them another name="),
        ([Ema(0.1, name="Fast"), Ema(0.2, name="fast")], "two averages are named 'fast'"),
    ],
)
def test_a_list_of_averages_is_not_empty_not_endless_and_has_no_name_twice(
    given_averages: list[Ema | str], text: str
) -> None:
    with pytest.raises(LocalProtocolError, match=text):
        parse_averages(given_averages)


def test_a_default_name_that_gets_too_long_asks_for_one() -> None:
    spec = "ema:0.9,warmup=timm,gamma=0." + "0" * 80 + "1"

    assert parse_average(spec, name="slow").name == "slow"
    with pytest.raises(LocalProtocolError, match="give it one with name="):
        parse_average(spec)


def test_a_name_of_ones_own_is_kept_and_checked() -> None:
    assert parse_average("raw", name="last").name == "last"
    with pytest.raises(LocalProtocolError, match="average name 'a/b'"):
        Ema(0.5, name="a/b")
