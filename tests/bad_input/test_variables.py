"""A misspelt variable is named with the one that was meant; what belongs to somebody else is left alone."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from ema_cli.app import build, run
from ema_proto.variables import VARIABLES, misspelt
from support.scripts import script
from trainer_client import ConnectError, EmaClient


def test_the_list_is_that_of_the_documentation() -> None:
    reference = script("docs_reference")
    tables = reference.server_settings() + reference.trainer_settings() + reference.reader_settings()

    assert set(re.findall(r"`(EMA_[A-Z_]+)`", tables)) == VARIABLES


@pytest.mark.parametrize("name", sorted(VARIABLES))
def test_a_letter_that_is_missing_or_too_many_is_found_in_every_name(name: str) -> None:
    stem = name.removeprefix("EMA_")
    wrong = {f"EMA_{stem}S", f"EMA_{stem[:-1]}", f"EMA_{stem[1:]}", name.lower()} - VARIABLES

    assert {meant for _, meant in misspelt(wrong)} == {name}
    assert [found for found, _ in misspelt(wrong)] == sorted(wrong)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EMA_URI", "EMA_URL"),
        ("EMA_ZQM", "EMA_ZMQ"),
        ("EMA_TOKN", "EMA_TOKEN"),
        ("EMA_DATA_DIR", "EMA_DATA"),
        ("EMA_ENDPIONT", "EMA_ENDPOINT"),
        ("EMA_PUBLISH_SECONDS", "EMA_PUBLISH_EVERY_SECONDS"),
        ("EMA_PUBLISH_EVERY_STEP", "EMA_PUBLISH_EVERY_STEPS"),
    ],
)
def test_usual_slips_are_found(name: str, meant: str) -> None:
    assert list(misspelt([name, "PATH"])) == [(name, meant)]


@pytest.mark.parametrize("name", ["EMA_DECAY", "EMA_WARMUP", "EMA_SECRETS_PATH", "EMAIL", "DEMA_TOKEN", "EMA_", "EMA"])
def test_what_is_not_like_ours_is_left_alone(name: str) -> None:
    assert list(misspelt([name, *VARIABLES])) == []


@pytest.mark.parametrize("command", [["serve", "--keep-generations", "0"], ["download", "digits"]], ids=" ".join)
def test_a_command_names_it_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setenv("EMA_TOKN", "hidden")
    monkeypatch.setenv("EMA_DECAY", "0.9")
    monkeypatch.setattr(sys, "argv", ["ema", *command])

    assert run(build()) == 2, "what the command itself says of its arguments"
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "ema: the variable EMA_TOKN is set, and nothing reads it: is EMA_TOKEN meant?"
    assert len(rest) == 1


def test_a_client_names_it_and_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("EMA_RUN_", "digits")
    monkeypatch.setenv("EMA_DECAY", "0.9")
    with caplog.at_level(logging.WARNING, "ema"), pytest.raises(ConnectError):
        EmaClient("tcp://127.0.0.1:9", connect_timeout_s=0.0)

    said = [record.message for record in caplog.records if "EMA_" in record.message]
    assert said == ["ema: the variable EMA_RUN_ is set, and nothing reads it: is EMA_RUN meant?"]
