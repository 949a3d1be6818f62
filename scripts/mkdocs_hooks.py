"""Hooks of the mkdocs build: generated blocks, pages from outside `docs/`, and links between them."""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts import docs_reference

ROOT = docs_reference.ROOT

# Files of the repository that are part of the site: where they are in the site.
MOUNTED = {
    **{f"examples/{file.name}": f"examples/{file.name}" for file in sorted((ROOT / "examples").glob("*.*"))},
    "proto/SPEC.md": "reference/protocol.md",
    "proto/openapi.json": "reference/openapi.json",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#:\s]+)(#[\w.-]+)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the mounted files."""
    for source, place in MOUNTED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Fill in generated blocks, and rewrite links to the place of their targets in the site."""
    place = page.file.src_uri
    source = next((outside for outside, mounted in MOUNTED.items() if mounted == place), f"docs/{place}")
    return docs_reference.fill(_LINK.sub(lambda link: _relinked(link, source, place), markdown))


def _relinked(link: re.Match[str], source: str, place: str) -> str:
    """A link from a repository file, as a link of the site; only its text if its target is not part of the site."""
    image, text, target, anchor = link.groups()
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if wanted in MOUNTED:
        found = MOUNTED[wanted]
    elif wanted.startswith("docs/") and (ROOT / wanted).is_file():
        found = wanted.removeprefix("docs/")
    elif (ROOT / wanted).exists():
        return text if text.startswith("`") else f"`{wanted}`" if text == target else text
    else:
        return link[0]  # mkdocs reports it
    return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(place) or '.')}{anchor or ''})"
