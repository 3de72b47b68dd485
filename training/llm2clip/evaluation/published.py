"""Published scores, which stand beside results of the same sets and protocols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from llm2clip.command_line.yaml_text import load_yaml

PUBLISHED = "published.yaml"


@dataclass(frozen=True)
class PublishedRow:
    """The scores of a model on a benchmark, as a source prints them; the file `published.yaml` has all.

    Attributes:
        model: As the source names it.
        benchmarks: Names of the benchmark; several hold the same images and captions in other files.
        scores: 0 to 1.
        protocol: Options that a result's protocol has to have, to be compared.
        source: Paper and version.
        unstated: What the source does not say, though numbers depend on it; empty if nothing.
    """

    model: str
    benchmarks: tuple[str, ...]
    scores: Mapping[str, float]
    protocol: Mapping[str, Any]
    source: str
    unstated: str = ""

    def fits(self, benchmark: str, protocol: Mapping[str, Any]) -> bool:
        """Tell whether the row may stand beside results of a benchmark by a protocol."""
        return benchmark in self.benchmarks and all(
            protocol.get(name) == value for name, value in self.protocol.items()
        )


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Read all published scores, in the order of the file."""
    text = (resources.files("llm2clip.evaluation") / PUBLISHED).read_text(encoding="utf-8")
    return tuple(row for table in load_yaml(text) for row in read_published(table))


def read_published(table: Mapping[str, Any]) -> Iterator[PublishedRow]:
    """Read the rows of one table of the file: a cell for each set, with a number for each score."""
    sets = [tuple(name.strip() for name in names.split("|")) for names in table["sets"]]
    facts = {name: str(table.get(name, "")) for name in ("source", "unstated")}
    for model, row in table["rows"].items():
        for names, cell in zip(sets, str(row).split(), strict=True):
            if cell != "-":
                values = [float(value) / 100 for value in cell.split("/")]
                scores = dict(zip(table["scores"], values, strict=True))
                yield PublishedRow(str(model), names, scores, table.get("protocol") or {}, **facts)
