"""Averages as values and as strings."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.averages.presets import PRESETS
from ema_proto.averages.profiles import gamma_of, sigma_rel_of
from ema_proto.averages.rules import AverageSpec, Ema, PowerEma, Raw, Uniform, Window, Wsd
from ema_proto.averages.specs import parse_average, parse_averages
from ema_proto.averages.step_units import StepUnits, check_step_units
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.names import check_patterns, is_chosen, unmatched
from ema_proto.receiver.ownership import check_join
from support.any_rule import any_rules
from support.peers import JOIN

decays = st.floats(0.0, 1.0, exclude_max=True)


@given(any_rules())
def test_every_rule_survives_its_string_exactly(rule: AverageSpec) -> None:
    read = parse_average(rule.spec, name=rule.name)

    assert read == rule
    assert read.spec == rule.spec
    assert parse_averages(rule.spec + ",name=x" if ":" in rule.spec else rule.spec + ":name=x") == (rule,)


@given(decays)
def test_decay_is_never_in_exponent_form(decay: float) -> None:
    assert "e" not in Ema(decay, name="x").spec.removeprefix("ema:").lower()


@given(
    st.sampled_from(sorted(PRESETS)),
    st.fixed_dictionaries({}, optional={"buffers": st.sampled_from(["average", "copy"]), "acc": st.just("float64")}),
    st.floats(0.01, 0.28),
)
def test_explicit_parameters_override_a_preset(name: str, own: dict[str, str], length: float) -> None:
    preset = PRESETS[name]
    own |= {"ema": {"decay": str(length)}, "power": {"sigma_rel": str(length)}}.get(preset.rule, {})
    meant = dict(preset.parameters) | own

    read = parse_average(_text(preset.rule, own | {"preset": name, "name": "x"}))
    assert read == parse_average(_text(preset.rule, meant | {"name": "x"}))
    assert parse_average(read.spec, name="x") == read


def _text(rule: str, parameters: dict[str, str]) -> str:
    return f"{rule}:{','.join(f'{key}={value}' for key, value in parameters.items())}"


@pytest.mark.parametrize(
    ("text", "spec", "name"),
    [
        ("ema:preset=timm-v2", "ema:0.9999,init=start", "ema-0.9999-init-start"),
        ("ema:0.9998,preset=timm-v3", "ema:0.9998", "ema-0.9998"),
        ("ema:preset=torch-ema", "ema:0.999,buffers=copy", "ema-0.999-buffers-copy"),
        ("swa:preset=torch-swa", "swa:buffers=copy", "swa-buffers-copy"),
        ("swa:preset=torch-swa,buffers=average", "swa", "swa"),
        ("ema:half_life=9,preset=torch-ema", "ema:half_life=9,buffers=copy", "ema-half_life-9-buffers-copy"),
        (
            "ema:warmup=timm,gamma=7,preset=timm-v3",
            "ema:0.9999,warmup=timm,gamma=7",
            "ema-0.9999-warmup-timm-gamma-7",
        ),
        ("power:gamma=7,preset=edm2,name=p", "power:gamma=7,buffers=copy", "p"),
    ],
)
def test_preset_does_not_appear_in_the_spec(text: str, spec: str, name: str) -> None:
    average = parse_average(text)

    assert (average.spec, average.name) == (spec, name)


def test_every_preset_parses_alone_or_with_a_decay() -> None:
    for name, preset in PRESETS.items():
        needs = preset.rule == "ema" and not preset.length
        average = parse_average(f"{preset.rule}:{'0.99,' if needs else ''}preset={name}")
        assert parse_average(average.spec) == average


@given(st.floats(1e-60, 1.0, exclude_max=True))
def test_default_name_is_valid_and_contains_the_decay(decay: float) -> None:
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
        ("ema:decay=0.9", "ema:0.9", "ema-0.9"),
        ("ema:half_life=5e3", "ema:half_life=5000", "ema-half_life-5000"),
        ("ema:half_life_samples=500000", "ema:half_life_samples=500000", "ema-half_life_samples-500000"),
        ("ema:half_life_epochs=2", "ema:half_life_epochs=2", "ema-half_life_epochs-2"),
        (
            "ema:half_life=inf,fraction=0.1,warmup=half_life",
            "ema:half_life=inf,warmup=half_life,fraction=0.1",
            "ema-half_life-inf-warmup-half_life-fraction-0.1",
        ),
        ("ema:0.9,warmup=exponential,tau=2000", "ema:0.9,warmup=exponential", "ema-0.9-warmup-exponential"),
        ("ema:0.9,init=start,acc=float64", "ema:0.9,init=start,acc=float64", "ema-0.9-init-start-acc-float64"),
        ("ema:0.9,include=head.weight", "ema:0.9,include=head.weight", "ema-0.9-include-head.weight"),
        ("power:sigma_rel=.05", "power:sigma_rel=0.05", "power-0.05"),
        ("power:gamma=6.94", "power:gamma=6.94", "power-gamma-6.94"),
        ("swa", "swa", "swa"),
        ("swa:every=1,start=1000", "swa:start=1000", "swa-start-1000"),
        ("swa:name=mean,start=9", "swa:start=9", "mean"),
        ("window:5", "window:5", "window-5"),
        ("window:5,every=100", "window:5,every=100", "window-5-every-100"),
        ("wsd:steps=2000,start=10000", "wsd:start=10000,steps=2000", "wsd-start-10000-steps-2000"),
        ("wsd:start=1,steps=2,shape=sqrt", "wsd:start=1,steps=2,shape=sqrt", "wsd-start-1-steps-2-shape-sqrt"),
        ("raw:name=last", "raw", "last"),
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
def test_string_becomes_its_canonical_spec_and_default_name(text: str, spec: str, name: str) -> None:
    average = parse_average(text)

    assert (average.spec, average.name) == (spec, name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", "''"),
        ("ema", "has no length"),
        ("ema:0.9,half_life=5", "decay and half_life"),
        ("ema:half_life=inf", "inf never ends"),
        ("ema:half_life=" + "9" * 400, "'9999"),
        ("ema:half_life=0", "0.0"),
        ("ema:half_life_samples=inf", "'inf'"),
        ("ema:0.9,tau=5", "warmup=exponential"),
        ("ema:0.9,warmup=timm,fraction=0.5", "warmup=half_life"),
        ("ema:0.9,warmup=timm,init=start", "leave init=start out"),
        ("ema:0.9,warmup=debias,init=start", "leave init=start out"),
        ("ema:0.9,init=zero", "'zero'"),
        ("ema:0.9,acc=bfloat16", "'bfloat16'"),
        ("ema:0.9,include=head.*", "give it one with name="),
        ("ema:0.9,exclude=head.", "give it one with name="),
        ("ema:0.9,include=,name=x", "''"),
        ("ema:0.9,include=a||b,name=x", "''"),
        ("ema:0.9,include=" + "a" * 1025 + ",name=x", "1 to 1024 characters"),
        ("ema:name=a/b,decay=0.9", "'a/b'"),
        ("ema:0.9,preset=timm", "'timm'"),
        ("ema:0.9,preset=torch-swa", "one of swa"),
        ("swa:5", "'5'"),
        ("swa:every=0", "'swa every' 0".replace("'", "")),
        ("power", "one of sigma_rel and gamma"),
        ("power:0.05", "'0.05'"),
        ("power:sigma_rel=0.05,gamma=7", "one of sigma_rel and gamma"),
        ("power:sigma_rel=0.29", "0.29"),
        ("power:gamma=-1", "-1.0"),
        ("window", "lacks k"),
        ("window:0", "window k 0"),
        ("window:257", "257"),
        ("wsd:start=5", "lacks steps"),
        ("wsd:start=5,steps=0", "wsd steps 0"),
        ("wsd:start=5,steps=9,shape=flat", "'flat'"),
        ("raw:buffers=copy", "'buffers=copy'"),
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
        ("raw:1", "'1'"),
        ("RAW", "'RAW'"),
        ("x" * 5000, "xxxx"),
        ("\ud800", "'\\ud800'"),
    ],
)
def test_invalid_string_is_refused_with_its_value_and_an_example(text: str, value: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        parse_average(text)

    assert value in str(caught.value)
    assert re.search(r"\b(use|add|leave|give) ", str(caught.value))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("decay", [True, "0.9"])
def test_decay_must_be_a_number(decay: object) -> None:
    with pytest.raises(LocalProtocolError, match="is not a number"):
        Ema(decay)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": "1"},
        {"power": True},
        {"min_decay": None},
        {"update_after": 1.0},
        {"update_after": True},
        {"half_life": "5", "decay": None},
    ],
    ids=str,
)
def test_parameter_must_be_a_number_of_its_kind(wrong: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError, match="is not a number"):
        Ema(**({"decay": 0.9, "warmup": "timm"} | wrong))  # type: ignore[arg-type]


def test_comma_before_a_parameter_does_not_end_the_rule() -> None:
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
def test_list_of_averages_is_bounded_and_has_unique_names(given_averages: list[Ema | str], text: str) -> None:
    with pytest.raises(LocalProtocolError, match=text):
        parse_averages(given_averages)


def test_too_long_default_name_asks_for_a_name() -> None:
    spec = "ema:0." + "0" * 80 + "1,warmup=timm,gamma=2"

    assert parse_average(spec, name="slow").name == "slow"
    with pytest.raises(LocalProtocolError, match="give it one with name="):
        parse_average(spec)


def test_given_name_is_kept_and_checked() -> None:
    assert parse_average("raw", name="last").name == "last"
    with pytest.raises(LocalProtocolError, match="average name 'a/b'"):
        Ema(0.5, name="a/b")


def test_name_in_a_string_and_name_argument_must_agree() -> None:
    assert parse_average("swa:name=mean", name="mean") == parse_average("swa", name="mean")
    with pytest.raises(LocalProtocolError, match="name it once"):
        parse_average("swa:name=mean", name="other")


@pytest.mark.parametrize("decay", [10**400, -(10**400), float("nan"), float("inf")])
def test_number_too_large_for_a_float_is_out_of_range(decay: float) -> None:
    with pytest.raises(LocalProtocolError, match=r"is not in \[0, 1\)"):
        Ema(decay)
    with pytest.raises(LocalProtocolError, match=r"is not a number of at least 1e-9 and below 1e15"):
        Ema(half_life_samples=decay)


@pytest.mark.parametrize("value", [1e-323, 1e-10, 1e15, 1.7e308])
@pytest.mark.parametrize(
    "others",
    [
        {"half_life": 9, "warmup": "half_life"},
        {"decay": 0.9, "warmup": "timm"},
        {"decay": 0.9, "warmup": "exponential"},
    ],
)
def test_impossible_length_is_refused(others: dict[str, Any], value: float) -> None:
    """The quotient of two such numbers is 0 or infinite, and an average of it NaN."""
    keys = ("half_life_samples", "half_life_epochs")
    parameters = {"half_life": ("half_life", "fraction"), "timm": ("gamma", "power"), "exponential": ("tau",)}
    given: list[dict[str, Any]] = [{**others, key: value} for key in parameters[others["warmup"]]]
    for each in [*given, *({key: value} for key in keys)]:
        with pytest.raises(LocalProtocolError, match=r"ema \w+ .* is not a number of at least 1e-9 and below 1e15"):
            Ema(**each)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [
        (0.01, 96.994898),
        (0.015, 63.658934),
        (0.02, 46.989582),
        (0.05, 16.972199),
        (0.10, 6.937204),
        (0.13, 4.603597),
        (0.15, 3.557869),
        (0.20, 1.826214),
        (0.25, 0.719824),
        (0.28, 0.169344),
    ],
)
def test_known_exponents_of_widths(sigma_rel: float, gamma: float) -> None:
    assert PowerEma(sigma_rel).exponent == pytest.approx(gamma, abs=5e-7)
    assert PowerEma(gamma=gamma).width == pytest.approx(sigma_rel, abs=5e-8)


@given(st.floats(1e-6, 0.2886))
def test_width_survives_its_exponent(sigma_rel: float) -> None:
    assert sigma_rel_of(min(gamma_of(sigma_rel), 1e6)) == pytest.approx(
        sigma_rel, rel=4e-6 if sigma_rel < 2e-6 else 1e-12
    )


@pytest.mark.parametrize("sigma_rel", [0.0, -1.0, 0.2887, float("nan")])
def test_impossible_width_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"is not (at least|from)"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("gamma", [-0.1, 1e7, float("nan")])
def test_exponent_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"is not (at least|from)"):
        sigma_rel_of(gamma)


@pytest.mark.parametrize(
    ("rule", "units", "missing"),
    [
        (Ema(half_life_samples=9), StepUnits(steps_per_epoch=5), "samples_per_step="),
        (Ema(half_life_epochs=9), StepUnits(samples_per_step=5), "steps_per_epoch="),
    ],
)
def test_unknown_unit_is_refused_with_what_to_pass(rule: Ema, units: StepUnits, missing: str) -> None:
    with pytest.raises(LocalProtocolError, match=missing):
        check_step_units([Raw(), rule], units)
    check_step_units([Raw(), Uniform(), Window(3), Wsd(1, 2), rule], StepUnits(5, 5))


@pytest.mark.parametrize("value", [0, -1.0, 1e-300, 1e15, 10**400, float("inf"), float("nan"), True, "5"])
def test_step_units_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(LocalProtocolError, match=r"steps_per_epoch .* is not a number of at least 1e-9 and below 1e15"):
        StepUnits(steps_per_epoch=value)


def test_patterns_match_whole_names_case_sensitively() -> None:
    names = ["head.weight", "Head.weight", "body.0.weight", "body.10.bias"]

    assert [name for name in names if is_chosen(name, (), ())] == names
    assert [name for name in names if is_chosen(name, ("head.*", "body.?.*"), ())] == ["head.weight", "body.0.weight"]
    assert [name for name in names if is_chosen(name, ("*.weight",), ("*ead*",))] == ["body.0.weight"]
    assert unmatched(("body.*", "tail.*"), names) == ("tail.*",)


@pytest.mark.parametrize(
    "value", [5, ["a"] * 257, [""], [5], [" a"], ["a,b"], ["a|b"], ["a\n"]], ids=lambda v: str(v)[:9]
)
def test_invalid_pattern_is_refused(value: object) -> None:
    with pytest.raises(LocalProtocolError, match="include"):
        check_patterns("include", value)
    assert check_patterns("include", "a.*") == ("a.*",)


def test_step_units_keep_what_newer_ones_leave_unset() -> None:
    assert StepUnits(32, 100).updated(StepUnits(samples_per_step=64)) == StepUnits(64, 100)
    assert StepUnits(32, 100).updated(StepUnits()) == StepUnits(32, 100)
    assert StepUnits().updated(StepUnits(steps_per_epoch=7)) == StepUnits(None, 7)


def test_join_without_the_unit_of_an_average_is_refused() -> None:
    asked = replace(JOIN, averages=(Ema(half_life_samples=9), Raw()))

    with pytest.raises(RemoteProtocolError, match="samples_per_step=") as caught:
        check_join(asked)
    assert caught.value.code is RejectCode.BAD_AVERAGE
    check_join(replace(asked, samples_per_step=32))


def test_join_with_an_unmatched_pattern_is_refused_with_known_names() -> None:
    name = JOIN.manifest.tensors[0].name

    for what in ("include", "exclude"):
        rule = Ema(0.9, "x", **{what: (name, "haed.*")})  # type: ignore[arg-type]
        with pytest.raises(RemoteProtocolError, match=rf"'haed\.\*' of {what}= of average 'x' .* {name}") as caught:
            check_join(replace(JOIN, averages=(Raw(), rule)))
        assert caught.value.code is RejectCode.BAD_AVERAGE
    check_join(replace(JOIN, averages=(Ema(0.9, "x", include=(name,)),)))


def test_join_has_a_bounded_number_of_patterns() -> None:
    name = JOIN.manifest.tensors[0].name
    rules = tuple(Ema(0.9, f"a{number}", include=(name,) * 128) for number in range(2))

    check_join(replace(JOIN, averages=rules))
    with pytest.raises(RemoteProtocolError, match="the run's averages have 257 patterns: use 256 at most"):
        check_join(replace(JOIN, averages=(*rules, Uniform(name="b", exclude=("*",)))))
