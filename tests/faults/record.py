"""The record of a run: how many faults, and what became of them; and its table in docs/reliability.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.documents.reading import ROOT

PAGE, RECORD = ROOT / "docs" / "reliability.md", Path(__file__).with_name("record.json")
PLACE = re.compile(r"(<!-- record: made by make test-faults -->\n).*?(<!-- /record -->\n)", re.DOTALL)
NONE = "No run of all commands has been recorded yet."
PARTS = ("kills", "faults", "damages")
TITLES = {"kills": "kills", "faults": "full disks, quotas, I/O errors", "damages": "damaged files"}


def count(outcomes: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, dict[str, int]]]:
    """Count outcomes, given as command, part (kills, faults, damages) and outcome."""
    counted: dict[str, dict[str, Counter[str]]] = {}
    for command, part, outcome in outcomes:
        counted.setdefault(command, {}).setdefault(part, Counter())[outcome] += 1
    return {command: {part: dict(found) for part, found in parts.items()} for command, parts in counted.items()}


def totals(commands: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Add the counts of all commands."""
    found: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    for parts in commands.values():
        for part, outcomes in parts.items():
            found[part].update(outcomes)
    return {part: dict(outcomes) for part, outcomes in found.items()}


def summary(record: dict[str, Any]) -> str:
    """Return the record in a few lines."""
    lines = []
    for part, outcomes in totals(record["commands"]).items():
        counts = ", ".join(f"{outcomes.get(outcome, 0)} {outcome}" for outcome in ("equal", "refused", "lost"))
        lines.append(f"{sum(outcomes.values()):4d} {TITLES[part]}: {counts}")
    ending = f"profile {record['profile']}, seed {record['seed']}, {record['minutes']:.0f} minutes"
    return "\n".join([*lines, ending])


def table(record: dict[str, Any]) -> str:
    """Return the record as a table in Markdown: a row per command, with a sentence about the run."""
    lines = ["| command | " + " | ".join(TITLES[part] for part in PARTS) + " | lost |", "| --- " + "| ---: " * 4 + "|"]
    rows = {**record["commands"], "all": totals(record["commands"])}
    for name, parts in rows.items():
        cells = [_cell(parts.get(part, {})) for part in PARTS]
        missing = sum(outcomes.get("lost", 0) for outcomes in parts.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {missing} |")
    run = (
        f"Profile {record['profile']}, seed {record['seed']}, {record['minutes']:.0f} minutes on {record['machine']}, "
        f"{record['date']}, commit {record['commit']}. A cell has the faults and, of these, those that ended equal to "
        "an unbroken run and those that were refused in clear words."
    )
    return "\n".join([run, "", *lines])


def _cell(outcomes: dict[str, int]) -> str:
    if not outcomes:
        return ""
    return f"{sum(outcomes.values())} ({outcomes.get('equal', 0)} + {outcomes.get('refused', 0)})"


def fill(page: str, record: dict[str, Any] | None) -> str:
    """Replace the table of the page; without a record, say that there is none.

    Raises:
        ValueError: The page has no place for it.
    """
    text = NONE if record is None else table(record)
    page, places = PLACE.subn(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)
    if places != 1:
        raise ValueError(f"{PAGE} has {places} places for the record, not one.")
    return page


def read() -> dict[str, Any] | None:
    """Read the last record, or None if none has been stored."""
    if not RECORD.is_file():
        return None
    return json.loads(RECORD.read_text(encoding="utf-8"))


def write(record: dict[str, Any]) -> None:
    """Store the record, and write its table into the page."""
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
