"""Hooks of mkdocs: the reference below the tables of the API page, and files of the repository outside of `docs`.

What a page links to becomes part of the site, at its path in the repository: Markdown as a page, all else as a file.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.hooks.links")
DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
API_ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>(?!https?:|#)[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to, and those that these link to."""
    pages = [Path(file.abs_src_path) for file in files if file.src_uri.endswith(".md")]
    while pages:
        page = pages.pop()
        for link in LINK.finditer(page.read_text(encoding="utf-8")):
            path = (page.parent / link["target"]).resolve()
            if path.is_file() and not path.is_relative_to(DOCS) and files.get_file_from_path(uri_of(path)) is None:
                files.append(File.generated(config, uri_of(path), abs_src_path=str(path)))
                if path.suffix == ".md":
                    pages.append(path)
    return files


def uri_of(path: Path) -> str:
    """Return the path of a file within the sources of the site."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Complete the text of a page."""
    if page.file.src_uri == "api.md":
        markdown = with_reference(markdown)
    source = Path(page.file.abs_src_path).resolve()
    return LINK.sub(lambda link: within_site(link, source), markdown)


def with_reference(markdown: str) -> str:
    """Link every name of the tables to its full documentation, which follows them."""
    names = API_ROW.findall(markdown)
    linked = API_ROW.sub(r"| [`\1`][llm2clip.\1] |", markdown)
    return "\n\n".join([linked, "## Reference", *(f"::: llm2clip.{name}" for name in names)])


def within_site(link: re.Match[str], source: Path) -> str:
    """Return a link with its target's place in the site; a folder, which has none, is named."""
    path = (source.parent / link["target"]).resolve()
    if not path.exists():
        LOG.warning("%s links to %s, which does not exist", source.relative_to(ROOT), link["target"])
    if not path.is_file():
        return link["text"].strip("![]")
    target = os.path.relpath(uri_of(path), Path(uri_of(source)).parent)
    return f"{link['text']}({target}{link['anchor'] or ''})"
