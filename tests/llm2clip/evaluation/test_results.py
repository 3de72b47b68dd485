"""Files of results, their tables on the terminal, and the published scores that stand beside them."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from llm2clip.evaluation.benchmarks import all_benchmarks, probe_by_name
from llm2clip.evaluation.results import PublishedRow, Result, print_results, published_rows, read_result
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


def row_of(model: str, benchmark: str, source: str) -> list[PublishedRow]:
    return [
        row for row in published_rows() if row.model == model and benchmark in row.benchmarks and source in row.source
    ]


def test_every_published_score_is_a_share_of_a_set_that_exists_and_is_there_once() -> None:
    rows = published_rows()
    names = {name for row in rows for name in row.benchmarks}
    known = all_benchmarks()
    assert [name for name in names if name not in known and probe_by_name(name, known) is None] == []
    assert all(0 < score < 1 for row in rows for score in row.scores.values())
    assert all(row.source and row.scores for row in rows)
    keys = Counter(
        (row.source, row.model, name, score, str(row.protocol))
        for row in rows
        for name in row.benchmarks
        for score in row.scores
    )
    assert [key for key, count in keys.items() if count > 1] == []


def test_rows_are_those_of_the_paper() -> None:
    (row,) = row_of("EVA02 L/14-224 + LLM2CLIP 60M", "docci", "v6")
    assert row.scores == pytest.approx({"image_to_text_recall@1": 0.901, "text_to_image_recall@1": 0.92})
    (row,) = row_of("EVA02 L/14-224 + LLM2CLIP 60M", "coco-karpathy", "v1")
    assert row.scores == pytest.approx({"image_to_text_recall@1": 0.704, "text_to_image_recall@1": 0.557})
    assert row.benchmarks == ("coco-salesforce", "coco-karpathy")
    rows = row_of("CLIP L/14-224 + LLM2CLIP", "imagenet-1k", "v6")
    found = {row.protocol["templates"]: row.scores["top1"] for row in rows if "templates" in row.protocol}
    assert found == pytest.approx({"paper": 0.732, "openai-80": 0.743})
    # What a result has to be, to stand beside one.
    (row,) = row_of("FG-CLIP 2 So/16", "coco-val2017", "FG-CLIP 2")
    assert row.fits("coco-val2017", {"name": "retrieval", "text_format": "lower"})
    assert not row.fits("coco-val2017", {"name": "retrieval", "text_format": "raw"})
    assert not row.fits("coco-karpathy", {"name": "retrieval", "text_format": "lower"})
