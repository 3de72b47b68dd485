"""Annotation files of Salesforce (ALBEF, BLIP), which LLM2CLIP reads: `[{"image": path, "caption": [texts]}]`."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.files import read_json_rows, text_field, texts_field


def salesforce_captions(file: Path) -> list[tuple[str, list[str]]]:
    """Read the path and the captions of each image.

    Raises:
        BenchmarkError: A row is broken.
    """
    rows = [(row, f"row {number} of {file}") for number, row in enumerate(read_json_rows(file), 1)]
    return [(text_field(row, "image", place), texts_field(row, "caption", place)) for row, place in rows]
