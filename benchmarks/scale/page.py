"""The tables of docs/scaling.md, measured and estimated."""

from __future__ import annotations

import re

from benchmarks.contest import ROOT
from benchmarks.scale import estimates, tables

PAGE = ROOT / "docs" / "scaling.md"
COMMAND = "python -m benchmarks.scale"


def fill(page: str) -> str:
    """Replace the tables of the page; each group is between a comment with its name and the command, and its end."""
    lines = tables.RESULTS.read_text(encoding="utf-8").splitlines()
    for name, text in (("measured", tables.tables(tables.newest(lines))), ("estimated", estimates.tables())):
        begin, end = f"<!-- {name}: made by {COMMAND} -->\n", f"<!-- /{name} -->\n"
        page, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for the tables {name!r}, not one.")
    return page


def write() -> None:
    """Write the tables into the page, and the plot beside the measurements."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    tables.draw(tables.newest(tables.RESULTS.read_text(encoding="utf-8").splitlines()))
