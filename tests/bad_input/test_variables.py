"""Misspelt variables are reported with the closest known name; variables of other programs are ignored."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from ema_cli.app import build, run
from ema_cli.app import variables as command_variables
from ema_proto.variables import misspelt
from support.scripts import script
from trainer_client import ConnectError, EmaClient
from trainer_client.settings import variables as trainer_variables

_COMMANDS = command_variables(build())
_TRAINER = {name for name in trainer_variables() if name.startswith("EMA_")}
_ALL = _COMMANDS | _TRAINER


def test_documentation_lists_every_variable() -> None:
    reference = script("docs_reference")
    settings = reference.server_settings() + reference.trainer_settings() + reference.reader_settings()

    assert set(re.findall(r"`(EMA_[A-Z_]+)`", settings + reference.commands())) == _ALL


@pytest.mark.parametrize("name", sorted(_ALL))
def test_missing_or_extra_letter_is_found_in_every_name(name: str) -> None:
    stem = name.removeprefix("EMA_")
    wrong = sorted({f"EMA_{stem}S", f"EMA_{stem[:-1]}", f"EMA_{stem[1:]}", name.lower()} - _ALL)

    warnings = list(misspelt(wrong, _ALL))

    assert [warning.split()[2] for warning in warnings] == wrong
    assert all(warning.endswith(f"did you mean {name}?") for warning in warnings)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EMA_URI", "EMA_URL"),
        ("EMA_ZQM", "EMA_ZMQ"),
        ("EMA_TOKN", "EMA_TOKEN"),
        ("EMA_DATA_DIR", "EMA_DATA"),
        ("EMA_ENDPIONT", "EMA_ENDPOINT"),
        ("EMA_PUBLISH_SECONDS", "EMA_PUBLISH_MIN_SECONDS or EMA_PUBLISH_EVERY_SECONDS"),
        ("EMA_PUBLISH_EVERY_STEP", "EMA_PUBLISH_EVERY_STEPS"),
    ],
)
def test_common_mistakes_are_found(name: str, meant: str) -> None:
    assert list(misspelt([name, "PATH"], _ALL)) == [
        f"the variable {name} is set, but nothing reads it: did you mean {meant}?"
    ]


@pytest.mark.parametrize(
    ("known", "others"), [(_COMMANDS, _TRAINER), (_TRAINER, _COMMANDS)], ids=["commands", "trainer"]
)
def test_variable_of_another_process_is_no_mistake(known: set[str], others: set[str]) -> None:
    assert list(misspelt(others, known)) == []


@pytest.mark.parametrize("name", ["EMA_DECAY", "EMA_WARMUP", "EMA_SECRETS_PATH", "EMAIL", "DEMA_TOKEN", "EMA_", "EMA"])
def test_other_variables_are_ignored(name: str) -> None:
    assert list(misspelt([name, *_ALL], _ALL)) == []


@pytest.mark.parametrize("command", [["serve", "--keep-generations", "0"], ["download", "digits"]], ids=" ".join)
def test_command_warns_and_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setenv("EMA_TOKN", "hidden")
    monkeypatch.setenv("EMA_DECAY", "0.9")
    monkeypatch.setattr(sys, "argv", ["ema", *command])

    assert run(build()) == 2, "the command still checks its own arguments"
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "ema: the variable EMA_TOKN is set, but nothing reads it: did you mean EMA_TOKEN?"
    assert len(rest) == 1


def test_client_warns_and_connects(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("EMA_RUN_", "digits")
    monkeypatch.setenv("EMA_DECAY", "0.9")
    with caplog.at_level(logging.WARNING, "ema"), pytest.raises(ConnectError):
        EmaClient("tcp://127.0.0.1:9", connect_timeout_s=0.0)

    warnings = [record.message for record in caplog.records if "EMA_" in record.message]
    assert warnings == ["ema: the variable EMA_RUN_ is set, but nothing reads it: did you mean EMA_RUN?"]
