"""The published scores that stand beside results."""

from __future__ import annotations

from collections import Counter

import pytest

from llm2clip.evaluation.benchmarks import all_benchmarks, probe_by_name
from llm2clip.evaluation.published import PublishedRow, published_rows


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
