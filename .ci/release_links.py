"""Name the repository in what is released, since no file of it does: `python .ci/release_links.py URL TAG`.

The links of README.md, which the package index shows, become absolute, and setup.cfg gets the URLs of the project.
Both files are changed in place, before a build.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<mark>!?)(?P<text>\[[^\]]*\])\((?!https?:)(?P<target>[^)]+)\)")


def with_absolute_links(page: str, url: str, tag: str) -> str:
    """Return the text of the README with links to the files of a tag."""

    def absolute(link: re.Match[str]) -> str:
        target = f"README.md{link['target']}" if link["target"].startswith("#") else link["target"]
        # The host shows a page under blob and sends the bytes of an image under raw.
        return f"{link['mark']}{link['text']}({url}/{'raw' if link['mark'] else 'blob'}/{tag}/{target})"

    return LINK.sub(absolute, page)


def with_project_urls(setup: str, url: str, tag: str) -> str:
    """Return the text of setup.cfg with the URLs of the project."""
    urls = {
        "Source": url,
        "Documentation": f"{url}/blob/{tag}/docs/index.md",
        "Changelog": f"{url}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    lines = "".join(f"    {name} = {place}\n" for name, place in urls.items())
    return setup.replace("[metadata]\n", f"[metadata]\nproject_urls =\n{lines}", 1)


if __name__ == "__main__":
    for file, change in {"README.md": with_absolute_links, "setup.cfg": with_project_urls}.items():
        path = ROOT / file
        path.write_text(change(path.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
