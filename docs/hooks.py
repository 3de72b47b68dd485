"""Hooks of mkdocs: the reference below the tables of the API page, and links that leave the folder of the site."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

LOG = logging.getLogger("mkdocs.hooks.links")
DOCS = Path(__file__).resolve().parent
API_ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
UPWARDS = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Complete the text of a page."""
    source = page.file.src_uri
    if source == "api.md":
        markdown = with_reference(markdown)
    return UPWARDS.sub(lambda match: without_link(match, source), markdown)


def with_reference(markdown: str) -> str:
    """Link every name of the tables to its full documentation, which follows them."""
    names = API_ROW.findall(markdown)
    linked = API_ROW.sub(r"| [`\1`][llm2clip.\1] |", markdown)
    return "\n\n".join([linked, "## Reference", *(f"::: llm2clip.{name}" for name in names)])


def without_link(match: re.Match[str], source: str) -> str:
    """Name a file of the repository that is not part of the site, after checking that it exists."""
    text, target = match[1], match[2]
    path = ((DOCS / source).parent / target).resolve()
    if path.is_relative_to(DOCS):
        return match[0]
    if not path.exists():
        LOG.warning("%s links to %s, which does not exist", source, target)
    name = path.relative_to(DOCS.parent).as_posix() if path.exists() else target
    return f"`{name}`" if text.strip("`").rstrip("/") == name.rstrip("/") else f"{text} (`{name}`)"
