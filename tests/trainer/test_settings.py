"""The settings of a client: arguments, variables, and errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from ema_proto.averages.rules import Ema
from ema_proto.averages.step_units import StepUnits
from ema_proto.names import check_name
from trainer_client import EmaClient, EmaClientError, SettingsError
from trainer_client.settings import Settings

_PARAMETERS = inspect.signature(EmaClient).parameters
_ARGUMENTS: dict[str, Any] = {
    **{name: parameter.default for name, parameter in _PARAMETERS.items()},
    "endpoint": "tcp://127.0.0.1:5555",
    "run": "resnet34",
}


def _settings(environ: dict[str, str] | None = None, **given: Any) -> Settings:
    return Settings.of({} if environ is None else environ, {**_ARGUMENTS, **given})


def test_every_argument_of_a_client_is_a_setting() -> None:
    fields = [field.name for field in dataclasses.fields(Settings) if field.metadata]

    assert fields == list(_PARAMETERS)


def test_step_units_come_from_arguments_or_variables() -> None:
    environ = {"EMA_SAMPLES_PER_STEP": "256", "EMA_STEPS_PER_EPOCH": "1e3"}

    assert _settings(environ).step_units == StepUnits(256, 1000)
    assert _settings(environ, samples_per_step=64).step_units == StepUnits(64, 1000)
    assert _settings({"EMA_SAMPLES_PER_STEP": ""}).step_units == StepUnits()
    with pytest.raises(SettingsError, match="EMA_STEPS_PER_EPOCH='many' is not a number"):
        _settings({"EMA_STEPS_PER_EPOCH": "many"})
    with pytest.raises(SettingsError, match=r"samples_per_step 0 is not a number of at least 1e-9 and below 1e15"):
        _settings(samples_per_step=0)
    with pytest.raises(SettingsError, match="pass steps_per_epoch= to EmaClient"):
        _settings(averages=["raw", "ema:half_life_epochs=2"], samples_per_step=64)


@pytest.mark.parametrize("wrong", [5, [5], [""], ["a,b"]], ids=str)
def test_invalid_pattern_is_refused_with_the_argument(wrong: object) -> None:
    assert _settings(include="head.*", exclude=["*.bias", "*.mask"]).exclude == ("*.bias", "*.mask")
    with pytest.raises(SettingsError, match="exclude="):
        _settings(exclude=wrong)


def test_variables_apply_if_arguments_are_not_given() -> None:
    environ = {"EMA_ENDPOINT": "tcp://ema:1", "EMA_RUN": "from-env", "EMA_TOKEN": "s3cret"}

    settings = _settings(environ, endpoint=None, run=None)

    assert (settings.endpoint, settings.run, settings.token) == ("tcp://ema:1", "from-env", "s3cret")
    assert not settings.run_generated


def test_arguments_take_precedence_over_variables() -> None:
    environ = {"EMA_ENDPOINT": "tcp://ema:1", "EMA_RUN": "from-env", "EMA_TOKEN": "s3cret"}

    settings = _settings(environ, token="other")

    assert (settings.endpoint, settings.run, settings.token) == ("tcp://127.0.0.1:5555", "resnet34", "other")


def test_empty_variable_counts_as_unset() -> None:
    settings = _settings({"EMA_RUN": "", "EMA_TOKEN": ""}, run=None)

    assert settings.token is None
    assert settings.run_generated


def test_generated_run_name_is_valid_and_unique() -> None:
    names = {_settings(run=None).run for _ in range(8)}

    assert all(check_name("run", name) == name for name in names)
    assert len(names) > 1


def test_token_never_appears_in_the_repr() -> None:
    assert "s3cret" not in repr(_settings(token="s3cret"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"endpoint": None}, "EMA_ENDPOINT"),
        ({"endpoint": "127.0.0.1:5555"}, "tcp://HOST:PORT"),
        ({"endpoint": "http://127.0.0.1:8080"}, "readers' address"),
        ({"endpoint": "tcp://*:5555"}, "tcp://HOST:PORT"),
        ({"endpoint": "tcp://host:70000"}, "port 70000"),
        ({"endpoint": "tcp://host:0"}, "port 0"),
        ({"endpoint": 5555}, "5555"),
        ({"run": "a/b"}, "'a/b'"),
        ({"run": ""}, "is empty"),
        ({"run": "v1"}, "reserved"),
        ({"run": 7}, "run=7"),
        ({"averages": ()}, "0 were given"),
        ({"averages": ("ema:1.5",)}, "1.5"),
        ({"averages": ("emma:0.9",)}, "emma:0.9"),
        ({"averages": (0.9999,)}, "0.9999 is not an average"),
        ({"averages": Ema(0.9)}, "not a list"),
        ({"averages": ("ema:0.9", Ema(0.9))}, "two averages"),
        ({"step": -1}, "step=-1"),
        ({"step": 1.0}, "step=1.0"),
        ({"every": 0}, "every=0"),
        ({"publish_every_steps": 0}, "publish_every_steps=0"),
        ({"publish_every_steps": 0.5}, "publish_every_steps=0.5"),
        ({"when_behind": "block"}, "skip, wait"),
        ({"resume": "yes"}, "auto, never, must"),
        ({"connect_timeout_s": -1}, "connect_timeout_s=-1"),
        ({"wait_timeout_s": float("inf")}, "wait_timeout_s=inf"),
        ({"wait_timeout_s": "1"}, "wait_timeout_s='1'"),
        ({"incarnation": -1}, "incarnation=-1"),
        ({"config": {"x": object()}}, "not JSON"),
        ({"config": {"x": float("nan")}}, "not JSON"),
        ({"config": "/nowhere/config.json"}, "/nowhere/config.json"),
        ({"config": {"x": "y" * (1 << 20)}}, "over the limit"),
    ],
)
def test_invalid_argument_is_refused_with_its_value_and_what_to_do(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _settings(**given)

    assert said in str(caught.value)
    assert isinstance(caught.value, EmaClientError)


def test_one_string_may_hold_several_averages() -> None:
    assert [average.name for average in _settings(averages="ema:0.9, raw").averages] == ["ema-0.9", "raw"]


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://host.example:1", "tcp://[::1]:5555", "tcp://[fe80::1%eth0]:5555", "ipc:///run/ema.sock", "ipc://@ema"],
)
def test_tcp_and_ipc_addresses_are_accepted(endpoint: str) -> None:
    assert _settings(endpoint=endpoint).endpoint == endpoint


def test_config_file_is_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"width":\r\n 64, "name": "\xc3\xa9"}')

    assert _settings(config=path).config == '{"width":\r\n 64, "name": "\u00e9"}'


def test_config_dict_becomes_json() -> None:
    config = _settings(config={"width": 64}).config

    assert config is not None
    assert json.loads(config) == {"width": 64}


def test_non_object_config_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]")

    with pytest.raises(SettingsError, match="not a JSON object"):
        _settings(config=str(path))


def test_elastic_restarts_are_the_default_incarnation() -> None:
    assert _settings({"TORCHELASTIC_RESTART_COUNT": "3"}).incarnation == 3
    assert _settings({"TORCHELASTIC_RESTART_COUNT": "3"}, incarnation=0).incarnation == 0
    assert _settings().incarnation == 0


def test_invalid_restart_count_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="TORCHELASTIC_RESTART_COUNT"):
        _settings({"TORCHELASTIC_RESTART_COUNT": "many"})
