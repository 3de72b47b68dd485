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
PARTS = ("kills", "faults", "damages")
TITLES = {"kills": "kills", "faults": "full disks, quotas, I/O errors", "damages": "damaged files"}
# Outcomes by command and part.
Counts = dict[str, dict[str, dict[str, int]]]


def count(outcomes: Iterable[tuple[str, str, str]]) -> Counts:
    """Count outcomes, given as command, part and outcome."""
    counted: Counts = {}
    for command, part, outcome in outcomes:
        found = counted.setdefault(command, {}).setdefault(part, {})
        found[outcome] = found.get(outcome, 0) + 1
    return counted


def _totals(commands: Counts) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    for parts in commands.values():
        for part, outcomes in parts.items():
            found[part].update(outcomes)
    return {part: dict(outcomes) for part, outcomes in found.items()}


def summary(record: dict[str, Any]) -> str:
    """Return the record in a few lines."""
    lines = []
    for part, outcomes in _totals(record["commands"]).items():
        counts = ", ".join(f"{outcomes.get(outcome, 0)} {outcome}" for outcome in ("equal", "refused", "lost"))
        lines.append(f"{sum(outcomes.values()):4d} {TITLES[part]}: {counts}")
    return "\n".join([*lines, f"profile {record['profile']}, seed {record['seed']}, {record['minutes']:.0f} minutes"])


def table(record: dict[str, Any]) -> str:
    """Return the record as a table in Markdown: a row per command, with a sentence about the run."""
    lines = ["| command | " + " | ".join(TITLES[part] for part in PARTS) + " | lost |", "| --- " + "| ---: " * 4 + "|"]
    for name, parts in {**record["commands"], "all": _totals(record["commands"])}.items():
        cells = [
            f"{sum(found.values())} ({found.get('equal', 0)} + {found.get('refused', 0)})" if found else ""
            for found in (parts.get(part, {}) for part in PARTS)
        ]
        missing = sum(outcomes.get("lost", 0) for outcomes in parts.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {missing} |")
    run = (
        f"Profile {record['profile']}, seed {record['seed']}, {record['minutes']:.0f} minutes on {record['machine']}, "
        f"{record['date']}, commit {record['commit']}. A cell has the faults and, of these, those that ended equal to "
        "an unbroken run and those that were refused in clear words."
    )
    return "\n".join([run, "", *lines])


def fill(page: str, record: dict[str, Any]) -> str:
    """Replace the table of the page."""
    page, places = PLACE.subn(lambda found: f"{found[1]}\n{table(record)}\n\n{found[2]}", page)
    assert places == 1, f"{PAGE} has {places} places for the record, not one."
    return page


def read() -> dict[str, Any]:
    """Read the last record."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def write(record: dict[str, Any]) -> None:
    """Store the record, a line for each command, and write its table into the page."""
    commands = ",\n".join(f'"{name}": {json.dumps(parts)}' for name, parts in record["commands"].items())
    fields = [f'"{name}": {json.dumps(value)}' for name, value in record.items() if name != "commands"]
    text = ",\n".join([*fields, f'"commands": {{\n{commands}\n}}'])
    RECORD.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
