"""Only results that may be compared share a column, and only rows that were published for it stand beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.evaluation.comparison import Comparison, add_published, compare, compared_scores, told_apart
from llm2clip.evaluation.published import PublishedRow
from llm2clip.evaluation.results import Result
from tests.llm2clip.evaluation.made_results import RETRIEVAL, ZERO_SHOT, classification, retrieval

RECALLS = ("image_to_text_recall@1", "text_to_image_recall@1")


def compared(*results: Result) -> Comparison:
    return compare([(Path(f"{number}.json"), result) for number, result in enumerate(results)])


def test_models_and_sets() -> None:
    comparison = compared(retrieval("a", t2i=0.5, i2t=0.25), retrieval("b", t2i=0.6), retrieval("b", "docci", t2i=0.7))
    assert [column.title for column in comparison.columns] == ["Urban1k", "DOCCI"]
    assert [row.label for row in comparison.rows] == ["a", "b"]
    assert comparison.rows[0].cells == {0: {RECALLS[0]: 0.25, RECALLS[1]: 0.5}}
    assert [comparison.rows[1].cells[number][RECALLS[1]] for number in (0, 1)] == [0.6, 0.7]
    assert {number: result.benchmark for number, result in comparison.rows[1].results.items()} == {
        0: "urban1k", 1: "docci",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "titles"),
    [
        ({"protocol": {**RETRIEVAL, "text_format": "lower"}}, ["(text format raw)", "(text format lower)"]),
        ({"protocol": {**RETRIEVAL, "positives": "distinct"}}, ["(positives rows)", "(positives distinct)"]),
        ({"data": {"checksum": "a" * 16}}, ["(data 01234567)", "(data aaaaaaaa)"]),
        ({"benchmark": "urban1k-other"}, ["(set urban1k)", "(set urban1k-other)"]),
        (
            {"differences": ["999 images instead of 1,000", "999 texts instead of 1,000"]},
            ["", "(not the published set: 999 images instead of 1,000, 999 texts instead of 1,000)"],
        ),
    ],
    ids=["text format", "positives", "data", "set", "counts"],
)
def test_results_that_differ_in_protocol_or_data_share_no_column(changed: dict, titles: list[str]) -> None:
    comparison = compared(retrieval("a"), retrieval("b", **{"title": "Urban1k", **changed}))
    assert [column.title for column in comparison.columns] == [f"Urban1k {title}".strip() for title in titles]
    assert [sorted(row.cells) for row in comparison.rows] == [[0], [1]]


def test_titles_name_what_has_no_usual_value_though_no_column_differs() -> None:
    lower = retrieval("a", protocol={**RETRIEVAL, "text_format": "lower"})
    comparison = compared(lower, classification("a"))
    assert [column.title for column in comparison.columns] == [
        "Urban1k (text format lower)",
        "ImageNet-1k (openai-80)",
    ]


def test_results_with_other_scores_to_compare_share_no_column() -> None:
    one_way = retrieval("b", intervals={}, scores={RECALLS[1]: 0.6})
    comparison = compared(retrieval("a"), one_way)
    assert [column.scores for column in comparison.columns] == [RECALLS, (RECALLS[1],)]
    assert [list(row.cells) for row in comparison.rows] == [[0], [1]]


def test_models_of_one_name_are_told_apart() -> None:
    other = {"given": "a", "library": "transformers", "fingerprint": "e" * 16}
    comparison = compared(retrieval("a"), retrieval("a", model=other), retrieval("b"))
    assert [row.label for row in comparison.rows] == ["a (fingerprint ffffffff)", "a (fingerprint eeeeeeee)", "b"]
    assert told_apart([("a", {"x": "1", "y": "1"}), ("a", {"x": "1", "y": "2"}), ("b", {"x": "2", "y": "1"})]) == [
        "a (y 1)",
        "a (y 2)",
        "b",
    ]


def test_a_result_that_was_measured_twice_counts_once_and_two_that_differ_are_an_error() -> None:
    assert len(compared(retrieval("a"), retrieval("a")).rows) == 1
    with pytest.raises(ValueError, match=r"0\.json and 1\.json .*Urban1k.*text_to_image_recall@1 is 0\.5 and 0\.51\."):
        compared(retrieval("a"), retrieval("a", t2i=0.51))


def test_scores_that_are_compared() -> None:
    assert compared_scores(retrieval("a").scores) == RECALLS
    assert compared_scores(["image_score", "text_score", "group_score"]) == (
        "text_score",
        "image_score",
        "group_score",
    )
    assert compared_scores(classification("a").scores) == ("top1",)


def test_differences_from_a_baseline() -> None:
    comparison = compared(
        retrieval("a", t2i=0.5), retrieval("b", t2i=0.75), retrieval("b", "docci"), classification("c")
    )
    (row,) = comparison.differences(comparison.baseline("a"))
    assert (row.label, row.cells) == ("b", {0: {RECALLS[0]: 0.0, RECALLS[1]: 0.25}})
    with pytest.raises(ValueError, match="no model is called 'ab'; did you mean"):
        comparison.baseline("ab")


def published(model: str, **fields: object) -> PublishedRow:
    values = {
        "benchmarks": ("urban1k", "urban1k-again"),
        "scores": {RECALLS[0]: 0.1, RECALLS[1]: 0.2},
        "protocol": {"text_format": "raw"},
        "source": "A paper",
    }
    return PublishedRow(model, **{**values, **fields})  # type: ignore[arg-type]


def test_published_rows_stand_beside_what_they_may_be_compared_with() -> None:
    raw, lower = retrieval("a"), retrieval("a", protocol={**RETRIEVAL, "text_format": "lower"})
    other = retrieval("a", data={"checksum": "b" * 16}, differences=["1 image instead of 2"])
    comparison = compared(raw, lower, other, retrieval("a", "docci"), retrieval("a", "urban1k-again"))
    lines = [
        published("one"),
        published("one", benchmarks=("docci",), unstated="what"),
        published("none", benchmarks=("dci",)),
        published("two", protocol={"text_format": "flair"}),
        published("three", protocol={}, source="Another paper"),
        published("top5 alone", scores={RECALLS[0]: 0.3}),
    ]
    assert add_published(comparison, lines) == 2
    assert [(row.label, row.source) for row in comparison.rows[1:]] == [("one", "A paper"), ("three", "Another paper")]
    one, three = comparison.rows[1:]
    assert one.cells == {number: {RECALLS[0]: 0.1, RECALLS[1]: 0.2} for number in (0, 3, 4)}
    assert one.unstated == ["what"]
    assert sorted(three.cells) == [0, 1, 4]


def test_published_rows_of_one_source_stand_together() -> None:
    comparison = compared(retrieval("a"))
    add_published(comparison, [published("one"), published("two", source="Another paper"), published("three")])
    assert [row.label for row in comparison.rows] == ["a", "one", "three", "two"]


def test_of_a_set_with_other_templates_nothing_was_published() -> None:
    comparison = compared(classification("a"), classification("b", protocol={**ZERO_SHOT, "templates": "paper"}))
    line = published("one", benchmarks=("imagenet-1k",), scores={"top1": 0.7}, protocol={"templates": "paper"})
    add_published(comparison, [line])
    assert comparison.rows[2].cells == {1: {"top1": 0.7}}


def test_a_baseline_that_several_papers_print_is_ambiguous() -> None:
    comparison = compared(retrieval("a"))
    add_published(comparison, [published("one"), published("one", source="Another paper"), published("two")])
    with pytest.raises(ValueError, match="A paper; Another paper"):
        comparison.baseline("one")
    assert comparison.differences(comparison.baseline("two"))[0].cells[0][RECALLS[1]] == pytest.approx(0.3)
