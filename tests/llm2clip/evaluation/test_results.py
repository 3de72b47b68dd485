"""Files of results, and their tables on the terminal."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from llm2clip.evaluation.results import Result, print_results, read_result
from llm2clip.files.atomic import write_json
from llm2clip.files.manifests import MANIFEST_CHECKSUM
from tests.llm2clip.evaluation.made_results import RETRIEVAL, classification, retrieval


def shown(*results: Result) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_results(console, results)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, result = tmp_path / "a.json", retrieval("a")
    result.write(path)
    assert read_result(path) == result
    assert next(iter(json.loads(path.read_text()))) == "schema_version"
    assert set(result.versions) == {"llm2clip", "python", "torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        (json.dumps({"schema_version": 7}), "is not a result of schema version 1: its version is 7"),
        (json.dumps({**asdict(retrieval("a")), "more": 1}), "is not a result .* unexpected keyword argument 'more'"),
        (json.dumps({"schema_version": 1}), "is not a result .* missing 10 required positional arguments"),
    ],
    ids=["cut", "version", "more", "less"],
)
def test_a_file_that_is_no_result_is_one_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=rf"result\.json {message}"):
        read_result(tmp_path / "result.json")


def test_a_changed_score_is_refused_until_its_checksum_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    retrieval("a").write(path)
    found = json.loads(path.read_text())
    found["scores"]["text_to_image_recall@1"] = 0.75
    write_json(path, found)
    with pytest.raises(ValueError, match=r"has changed since it was written.*delete its manifest_checksum"):
        read_result(path)
    del found[MANIFEST_CHECKSUM]
    write_json(path, found)
    assert read_result(path).scores["text_to_image_recall@1"] == 0.75


def test_protocols_have_tables_of_their_own() -> None:
    raw = retrieval("a")
    lower = replace(raw, title="Third set", protocol={**RETRIEVAL, "text_format": "lower"})
    found = shown(raw, replace(raw, title="Second set"), lower)
    assert found.count("T2I R@1 / 5 / 10") == 2
    assert found.index("Second set") < found.index("text format lower")
    assert "Protocol: retrieval, positives rows, ties expected value, text format raw." in found
    assert "47.0-52.0" in found
    # Several models share a table, of which each row names one.
    both = shown(raw, retrieval("b"), classification("b"))
    assert "Urban1k (" not in both
    assert "Urban1k (urban1k-again)" in shown(raw, replace(raw, benchmark="urban1k-again"))
    assert both.count("model") == 2
    assert "Protocol: zero-shot classification, templates openai-80, text format raw." in both


def test_what_to_know_of_a_result_is_said_below_the_tables() -> None:
    counts = {"truncated_texts": 1, "tied_text_queries": 2, "tied_image_queries": 1, "skipped_images": 2}
    ranks = {"text_to_image_median_rank": 3, "text_to_image_mean_rank": 1234.5}
    differences = ["1 images instead of 2", "4 texts instead of 3"]
    result = retrieval("a", counts={**counts, "empty_texts": 1}, ranks=ranks, differences=differences)
    words = (
        "T2I median rank 3; T2I mean rank 1,234; 3 tied queries; 1 text cut at its end; "
        "1 empty text; 2 images skipped; not the published set, 1 images instead of 2, 4 texts instead of 3."
    )
    assert f"Urban1k: {words}" in shown(result)
    assert f"b, Urban1k: {words}" in shown(retrieval("a"), replace(result, model={"given": "b", "fingerprint": "f"}))
