"""The model card with its scores: valid YAML, and a table."""

from __future__ import annotations

import pytest
import yaml

from ema_reader import Reader
from ema_reader.card import card_with_scores
from support.served import Served

CARD = "---\ntags:\n- one\n---\n# digits/raw, step 5\n\n---\n\nText.\n"


def index(**metrics: float) -> list[dict[str, object]]:
    listed = [{"type": name, "name": name, "value": value} for name, value in metrics.items()]
    return [{"name": "digits/raw", "results": [{"task": {"name": "t|1"}, "dataset": {}, "metrics": listed}]}]


def test_metadata_is_replaced_and_the_text_stays() -> None:
    data = {"tags": ["a", "ü: #"], "model-index": index(accuracy=0.75)}

    card = card_with_scores(CARD, data)

    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == data
    assert body.startswith("# digits/raw, step 5\n\n---\n\nText.\n")
    assert body.endswith("| task | metric | value |\n|---|---|---|\n| t\\|1 | accuracy | 0.75 |\n")


def test_without_scores_there_is_no_table() -> None:
    assert card_with_scores(CARD, {"tags": ["one"]}).endswith("---\n\nText.\n")


@pytest.mark.parametrize("rev", ["latest", "step-100"])
def test_card_of_a_version_has_its_rule_and_its_scores(served: Served, reader: Reader, rev: str) -> None:
    version = served.publish("digits", 100, ["raw"]).versions[0]
    reader.report(f"digits/raw@{version.id}", {"accuracy": 0.75})

    card = reader.card(f"digits/raw@{rev}")

    assert "# digits/raw, step 100" in card
    assert version.id in card
    assert "| default | accuracy | 0.75 |" in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75


def test_readme_of_the_trainer_is_returned_as_it_is(served: Served, reader: Reader) -> None:
    served.publish("digits", 100, ["raw"], companions={"README.md": b"# Mine\n"})

    assert reader.card("digits/raw") == "# Mine\n"
