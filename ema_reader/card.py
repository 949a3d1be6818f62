"""The model card of a version with its scores. Pure: no requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_FENCE = "---\n"


def card_with_scores(readme: str, data: Mapping[str, Any]) -> str:
    """A generated `README.md` with other metadata, and with a table of the scores in it.

    Args:
        readme: the card: metadata between two lines `---`, then Markdown.
        data: the metadata that takes its place; `model-index` has the scores, as the Hugging Face Hub writes them.
    """
    _, _, body = readme.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    # JSON is YAML: names of metrics need no other quoting.
    head = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in data.items())
    rows = [
        f"| {_cell(result['task']['name'])} | {_cell(metric['name'])} | {metric['value']!r} |"
        for entry in data.get("model-index", ())
        for result in entry["results"]
        for metric in result["metrics"]
    ]
    table = "\n".join(["", "## Scores", "", "| task | metric | value |", "|---|---|---|", *rows, ""]) if rows else ""
    return f"{_FENCE}{head}{_FENCE}{body}{table}"


def _cell(text: str) -> str:
    """Text in a cell of a table: one line, without the character that ends a cell."""
    return " ".join(text.replace("|", "\\|").split())
