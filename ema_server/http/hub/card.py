"""The model card of a version, `README.md`, and its scores as the Hub lists them.

A commit never changes, and clients keep its files for ever. The card therefore has what is fixed with the version; the
scores, which come later, are in the answer to `model_info`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ema_server.evaluation.metric_store import Report
from ema_server.storage.catalog import Version
from ema_server.storage.records import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    DIFFUSERS_KEY,
    VERSION_FILE,
    read_json,
)

README = "README.md"
TAGS = ("ema-sidecar", "weight-averaging")
_CARDS_MAX = 256
_LOADING = {
    "transformers": ("from transformers import AutoModel", 'AutoModel.from_pretrained("{repo}", revision="{id}")'),
    "diffusers": ("import diffusers", 'diffusers.{kind}.from_pretrained("{repo}", revision="{id}")'),
    "peft": ("from peft import PeftModel", 'PeftModel.from_pretrained(base_model, "{repo}", revision="{id}")'),
    "timm": ("import timm", 'timm.create_model("hf-hub:{repo}@{id}", pretrained=True)'),
    None: (
        "from huggingface_hub import hf_hub_download",
        'hf_hub_download("{repo}", "model.safetensors", revision="{id}")',
    ),
}


@dataclass(frozen=True, slots=True)
class Card:
    """What `model_info` and `README.md` say of a version; `text` is the generated `README.md`."""

    library: str | None
    tags: tuple[str, ...]
    text: bytes


@lru_cache(maxsize=_CARDS_MAX)
def read_card(version: Version) -> Card:
    """The card of a version, which the caller holds.

    Raises:
        BrokenGeneration: its `version.json` or `config.json` is not a JSON object.
        OSError: they cannot be read.
    """
    written = read_json((version.folder / VERSION_FILE).read_bytes())
    has_config = version.file(CONFIG_FILE) is not None
    config = read_json((version.folder / CONFIG_FILE).read_bytes()) if has_config else {}
    library = _library(version, config)
    tags = TAGS if library is None else (library, *TAGS)
    return Card(library, tags, _text(version, written, library, tags, config).encode())


def model_index(version: Version, reports: Iterable[Report]) -> list[dict[str, Any]]:
    """The scores of a version as `model-index`, empty without any: for each task those of its newest report."""
    newest: dict[str, Report] = {}
    for report in sorted(reports, key=lambda report: report.at):
        if report.metrics:
            newest[report.task] = report
    if not newest:
        return []
    results = [
        {
            "task": {"type": "other", "name": task},
            "dataset": {"type": "other", "name": task},
            "metrics": [{"type": name, "name": name, "value": value} for name, value in report.metrics.items()],
        }
        for task, report in sorted(newest.items())
    ]
    return [{"name": f"{version.run}/{version.average}", "results": results}]


def ledger_digest(written: Mapping[str, Any]) -> str | None:
    """The sha256 of the canonical JSON of what `version.json` says of the steps inside; None if it says nothing."""
    derived = written.get("derived")
    ledger = written["ledger"] if derived is None else derived.get("ledgers")
    if not ledger:
        return None
    canonical = json.dumps(ledger, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _library(version: Version, config: Mapping[str, Any]) -> str | None:
    """The library that loads this model; None if no file says so."""
    if version.file(ADAPTER_CONFIG) is not None:
        return "peft"
    if DIFFUSERS_KEY in config:
        return "diffusers"
    if "model_type" in config:
        return "transformers"
    return "timm" if "architecture" in config else None


def _text(
    version: Version, written: Mapping[str, Any], library: str | None, tags: tuple[str, ...], config: Mapping[str, Any]
) -> str:
    repo = f"{version.run}/{version.average}"
    digest = ledger_digest(written)
    rows = [
        ("rule", f"`{version.spec}`"),
        ("step", str(version.step)),
        ("updates", str(version.updates)),
        ("steps lost", str(version.gap_steps)),
        ("made", f"by {version.derived} from stored versions" if version.derived else "during training"),
        ("created", version.created),
        ("version", f"`{version.id}`"),
        *([("ledger", f"`sha256:{digest}`")] if digest else []),
        *((file.name, f"`sha256:{file.sha256}`") for file in version.files if file.name.endswith(".safetensors")),
    ]
    modules, call = _LOADING[library]
    loading = call.format(repo=repo, id=version.id, kind=config.get("_class_name", "ModelMixin"))
    head = ["---", *([f"library_name: {library}"] if library else []), "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines = [
        *head,
        f"# {repo}, step {version.step}",
        "",
        f"The average `{version.average}` of the weights of the training run `{version.run}`, made by ema-sidecar.",
        "`version.json` has the ledger: the steps inside, from which their exact weights follow.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "```python",
        modules,
        "",
        loading,
        "```",
    ]
    return "\n".join(lines) + "\n"
