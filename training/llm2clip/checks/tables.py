"""The tables of `llm2clip check-data`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from llm2clip.command_line.tables import print_table

# Letters of a detail; the JSON file has the whole.
DETAIL_WIDTH = 70


def print_tables(report: dict[str, Any], title: str) -> None:
    """Print what was found in data of this title as tables."""
    # Keys and captions are not markup: "[bold]" and ":dog:" are printed as they are.
    console = Console(markup=False, emoji=False, highlight=False)
    captions, images = report["captions"], report["images"]
    scripts = ", ".join(f"{name} {count:,}" for name, count in captions["scripts"].items())
    counts = [
        ("rows", f"{report['rows']:,}, of which {report['usable_rows']:,} can be used"),
        ("captions", f"{captions['count']:,}"),
        ("distinct", f"{captions['distinct']:,}; without case and white space "
                     f"{captions['distinct_ignoring_case_and_space']:,}"),
        ("scripts", scripts or "none"),
        ("images", "not read" if images is None else f"{images['count']:,} decoded"),
    ]  # fmt: skip
    print_table(console, title, ("", "number"), counts, (0, 1))
    lengths = [
        (name, f"{column['rows']:,}", f"{column['captions']:,}", *_numbers(column["words"]))
        for name, column in captions["columns"].items()
    ]
    titles = ("min", "median", "p95", "max")
    print_table(console, "Captions, length in words", ("column", "rows", "captions", *titles), lengths)
    if report["tokens"]:
        tokens = [
            (name, f"{counts['limit']:,}", f"{counts['cut']:,}", *_numbers(counts["length"]))
            for name, counts in report["tokens"].items()
        ]
        columns = ("tokenizer", "limit", "cut captions", *titles)
        print_table(console, "Captions, length in tokens", columns, tokens)
    if images is not None:
        sizes = [(side, *_numbers(images[side])) for side in ("width", "height")]
        print_table(console, "Images, size in pixels", ("", *titles), sizes)
    findings = [
        (name, f"{finding['count']:,}", "yes" if finding["stops"] else "", _examples(finding["examples"]))
        for name, finding in report["findings"].items()
        if finding["count"]
    ]
    print_table(
        console, "Findings", ("", "number", "stops a run", "first rows"), findings or [("nothing", "", "", "")], (0, 3)
    )


def _numbers(values: dict[str, int] | None) -> list[str]:
    return ["-"] * 4 if values is None else [f"{value:,}" for value in values.values()]


def _examples(examples: list[dict[str, str]]) -> str:
    return "\n".join(f"{_shortened(example['key'])}: {_shortened(example['detail'])}" for example in examples)


def _shortened(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= DETAIL_WIDTH else f"{text[:DETAIL_WIDTH]}…"
