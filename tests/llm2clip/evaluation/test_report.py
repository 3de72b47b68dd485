"""`llm2clip report`: only results that may be compared share a column, with rows that were published for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip import cli
from llm2clip.evaluation.comparison import Report, compare_results
from llm2clip.evaluation.plots import draw_lengths, draw_models
from llm2clip.evaluation.published import PublishedRow
from llm2clip.evaluation.results import Result
from tests.llm2clip.evaluation.made_results import RETRIEVAL, classification, retrieval, written

SIDES = ("image_to_text_recall@1", "text_to_image_recall@1")
LOWER = {**RETRIEVAL, "text_format": "lower"}


def compared(*results: Result) -> Report:
    return compare_results(results)


def titles(found: Report) -> list[str]:
    return [column.title for column in found.columns]


@pytest.fixture
def two_models(tmp_path: Path) -> list[str]:
    return written(
        tmp_path / "results",
        retrieval("openai/clip", t2i=0.556, i2t=0.683),
        retrieval("runs/mine", t2i=0.7712, i2t=0.6),
        retrieval("runs/mine", "docci", t2i=0.5, i2t=0.4),
        classification("openai/clip", 0.755),
    )


def test_models_are_rows_and_sets_are_columns() -> None:
    found = compared(retrieval("a", t2i=0.5, i2t=0.25), retrieval("b", t2i=0.6), retrieval("b", "docci", t2i=0.7))
    assert titles(found) == ["DOCCI", "Urban1k"]
    assert [row.label for row in found.rows] == ["a", "b"]
    assert found.rows[0].cells == {1: {SIDES[0]: 0.25, SIDES[1]: 0.5}}
    assert [found.rows[1].cells[number][SIDES[1]] for number in (0, 1)] == [0.7, 0.6]
    assert {number: result.benchmark for number, result in found.rows[1].results.items()} == {0: "docci", 1: "urban1k"}


@pytest.mark.parametrize(
    ("changed", "notes"),
    [
        ({"protocol": LOWER}, ["(text format raw)", "(text format lower)"]),
        ({"protocol": {**RETRIEVAL, "positives": "distinct"}}, ["(positives rows)", "(positives distinct)"]),
        ({"data": {"checksum": "a" * 16}}, ["(data 01234567)", "(data aaaaaaaa)"]),
        ({"benchmark": "urban1k-other"}, ["(set urban1k)", "(set urban1k-other)"]),
        (
            {"differences": ["999 images instead of 1,000", "999 texts instead of 1,000"]},
            ["", "(not the published set: 999 images instead of 1,000, 999 texts instead of 1,000)"],
        ),
        ({"compared": [SIDES[1]]}, ["", ""]),
        ({"protocol": {**RETRIEVAL, "id": "other", "name": "other"}}, ["(protocol retrieval)", "(protocol other)"]),
    ],
    ids=["text format", "positives", "data", "set", "counts", "scores", "protocol"],
)
def test_results_that_differ_in_protocol_or_data_share_no_column(changed: dict, notes: list[str]) -> None:
    found = compared(retrieval("a"), retrieval("b", **{"title": "Urban1k", **changed}))
    assert titles(found) == [f"Urban1k {note}".strip() for note in notes]
    assert [sorted(row.cells) for row in found.rows] == [[0], [1]]


def test_a_result_that_was_measured_twice_counts_once_and_two_that_differ_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(compared(retrieval("a"), retrieval("a")).rows) == 1
    paths = written(tmp_path, retrieval("a"), retrieval("a", t2i=0.51))
    # As on a CPU and a GPU, which round differently.
    close = compared(retrieval("a"), retrieval("a", t2i=0.5004))
    assert close.rows[0].cells[0][SIDES[1]] == 0.5
    assert "of one model on one set differ by up to 0.0004: urban1k" in caplog.text
    with pytest.raises(ValueError, match=r"0\.json and .*1\.json .*Urban1k.*text_to_image_recall@1 is 0\.5 and 0\.51"):
        compare_results(paths)


def published(model: str, **fields: Any) -> PublishedRow:
    values = {
        "benchmarks": ("urban1k", "urban1k-again"),
        "scores": {SIDES[0]: 0.1, SIDES[1]: 0.2},
        "protocol": {"text_format": "raw"},
        "source": "A paper",
    }
    return PublishedRow(model, **{**values, **fields})


def test_published_rows_stand_beside_what_they_may_be_compared_with() -> None:
    other = retrieval("a", data={"checksum": "b" * 16}, differences=["1 image instead of 2"])
    again = retrieval("a", "urban1k-again")
    found = compared(retrieval("a"), retrieval("a", protocol=LOWER), other, retrieval("a", "docci"), again)
    lines = [
        published("one"),
        published("one", benchmarks=("docci",), unstated="what"),
        published("none", benchmarks=("dci",)),
        published("two", protocol={"text_format": "flair"}),
        published("three", protocol={}, source="Another paper"),
        published("four"),
        published("top5 alone", scores={SIDES[0]: 0.3}),
    ]
    assert found.add_published(lines) == 3
    # Those of one source stand together.
    assert [(row.label, row.source) for row in found.rows[1:]] == [
        ("one", "A paper"), ("four", "A paper"), ("three", "Another paper"),
    ]  # fmt: skip
    one, _, three = found.rows[1:]
    columns = [
        (column.first.benchmark, column.first.protocol["text_format"], bool(column.first.differences))
        for column in found.columns
    ]
    assert columns == [
        ("docci", "raw", False), ("urban1k", "raw", False), ("urban1k", "lower", False), ("urban1k", "raw", True),
        ("urban1k-again", "raw", False),
    ]  # fmt: skip
    assert one.cells == {number: {SIDES[0]: 0.1, SIDES[1]: 0.2} for number in (0, 1, 4)}
    assert one.unstated == ["what"]
    assert sorted(three.cells) == [1, 2, 4]


def test_a_report_is_a_table_of_pandas_json_and_markdown() -> None:
    found = compared(retrieval("a"), retrieval("b", "docci"), classification("b"))
    found.add_published([published("one")])
    frame = found.to_pandas()
    assert frame.index.tolist() == ["a", "b", "one"]
    assert frame.columns.tolist() == [
        *(("DOCCI", side) for side in SIDES), *(("Urban1k", side) for side in SIDES),
        ("ImageNet-1k (openai-80)", "top1"),
    ]  # fmt: skip
    assert frame.loc["a", ("Urban1k", SIDES[1])] == 0.5
    assert frame.loc["one"].tolist()[2:4] == [0.1, 0.2]
    assert frame.loc["a"].isna().tolist() == [True, True, False, False, True]
    content = json.loads(found.to_json())
    assert content["columns"][1] == {"title": "Urban1k", "benchmark": "urban1k", "protocol": RETRIEVAL}
    first, _, paper = content["rows"]
    assert (first["model"], first["source"], paper["source"]) == ("a", "", "A paper")
    assert first["scores"] == {"Urban1k": {SIDES[0]: 0.25, SIDES[1]: 0.5}}
    assert first["intervals"]["Urban1k"][SIDES[1]] == pytest.approx([0.47, 0.52])
    assert paper["intervals"] == {}
    assert "| a |  | 25.0 / 50.0 |  |\n" in found.to_markdown()


def test_a_baseline_with_which_no_other_model_shares_a_set_has_no_differences() -> None:
    found = compared(retrieval("a"), retrieval("b", "docci"))
    assert found.table(found.baseline("a")) == (found.table()[0], [])


def test_the_page_and_its_plots(two_models: list[str], tmp_path: Path) -> None:
    languages = {"language": {"de": {"text_to_image_recall@1": 0.125}, "en": {"text_to_image_recall@1": 0.5}}}
    two_models += written(tmp_path / "more", retrieval("a|b", "xm3600", groups=languages))
    output = tmp_path / "deep" / "my table.md"
    assert cli.main(["report", *two_models, "--baseline", "openai/clip", "--output", str(output)]) == 0
    page = output.read_text()
    assert "| openai/clip |  | 68.3 / 55.6 |" in page
    assert "| runs/mine |  | -8.3 / +21.5 |" in page
    assert "| runs/mine | 77.1 (74.1 to 79.1) |" in page
    assert "Protocol: retrieval, positives rows, ties expected value, text format raw." in page
    assert "| a\\|b |" in page
    assert "| language, T2I R@1 | a\\|b |\n| --- | ---: |\n| de | 12.5 |\n| en | 50.0 |" in page
    assert "tench" not in page
    assert "By length" not in page
    for plot in ("my table-models.png", "my table-lengths.png"):
        assert f"({plot.replace(' ', '%20')})" in page
        assert Image.open(output.parent / plot).width > 100
    assert sorted(path.name for path in output.parent.iterdir() if path.suffix != ".png") == ["my table.md"]
    table, lines = output.with_suffix(".json"), output.with_suffix(".csv")
    for path in (table, lines):
        assert cli.main(["report", *two_models, "--output", str(path)]) == 0
    assert [row["model"] for row in json.loads(table.read_text())["rows"]] == ["openai/clip", "runs/mine", "a|b"]
    assert "benchmark,score,model,value\n" in lines.read_text()
    assert "ImageNet-1k (openai-80),top1,openai/clip,0.755\n" in lines.read_text()


def test_mistakes_end_in_one_error(two_models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    twice = written(tmp_path / "twice", retrieval("openai/clip", t2i=0.567))
    for arguments, message in (
        ([], "llm2clip report results/*.json"),
        ([str(tmp_path / "none.json")], f"no result file {tmp_path / 'none.json'}"),
        ([str(tmp_path / "empty")], "no result file"),
        ([*two_models, "--baseline", "openai/clap"], "did you mean 'openai/clip'"),
        ([*two_models, "--baseline", "st2"], "no model is called 'st2'. The models are openai/clip, "),
        ([*two_models, "--output", str(tmp_path / "table.html")], "ends in .md, .json or .csv"),
        ([*two_models, "--output", str(tmp_path / "file" / "table.md")], "cannot be a folder"),
        ([*two_models, *twice], "but differ"),
        ([str(tmp_path / "file")], "is not valid JSON"),
    ):
        assert cli.main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_bars_and_lines_show_the_scores() -> None:
    results = [retrieval("a", t2i=0.5), retrieval("b", t2i=0.6), retrieval("b", "docci", t2i=0.7), classification("a")]
    report = compare_results(results)
    _, text_to_image, top1 = draw_models(report).axes
    bars = {bars.get_label(): [round(bar.get_height(), 6) for bar in bars] for bars in text_to_image.containers[1::2]}
    assert bars == {"a": [50.0], "b": [70.0, 60.0]}
    (first,), (_, second) = text_to_image.containers[1::2]
    assert first.get_x() + first.get_width() == pytest.approx(second.get_x()), "beside each other"
    (whisker,) = text_to_image.containers[0].lines[2][0].get_segments()
    assert whisker[:, 1].tolist() == pytest.approx([47.0, 52.0])
    assert [label.get_text() for label in text_to_image.get_xticklabels()] == ["DOCCI", "Urban1k"]
    assert [label.get_text() for label in top1.get_xticklabels()] == ["ImageNet-1k (openai-80)"]
    figure = draw_lengths(report)
    assert figure is not None
    docci, urban = figure.axes
    assert [label.get_text() for label in urban.get_xticklabels()] == ["17-32", "129-256", "513-"]
    lines = {line.get_label(): [round(float(value), 6) for value in line.get_ydata()] for line in urban.get_lines()}
    assert lines == {"a": [50.0, 60.0, 70.0], "b": [60.0, 70.0, 80.0]}
    assert docci.get_title() == "DOCCI"


def test_long_titles_stay_inside_the_figures_and_do_not_overlap() -> None:
    differences = ["20 images instead of 1,000", "100 texts instead of 5,000"]
    results = [retrieval("a", name, title=name, differences=differences) for name in ("docci", "urban1k", "iiw")]
    results += [classification("a", differences=differences), retrieval("b")]
    report = compare_results(results)
    for figure in (draw_models(report), draw_lengths(report)):
        assert figure is not None
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        titles = [axis.title.get_window_extent(renderer) for axis in figure.axes]
        labels = [label.get_window_extent(renderer) for axis in figure.axes for label in axis.get_xticklabels()]
        for box in (*titles, *labels):
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        legend = figure.legends[0].get_window_extent(renderer)
        assert not any(legend.overlaps(box) for box in labels)
        assert not any(one.overlaps(other) for one in titles for other in titles if one is not other)
        assert all(axis.bbox.height > 100 for axis in figure.axes)
