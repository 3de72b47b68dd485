"""`llm2clip report`: results of files as tables, a page and plots."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip import cli
from llm2clip.evaluation import report
from llm2clip.evaluation.comparison import Comparison, Row, add_published, compare
from llm2clip.evaluation.published import PublishedRow
from llm2clip.evaluation.report_page import as_markdown
from llm2clip.evaluation.report_plots import draw_lengths, draw_models
from llm2clip.evaluation.results import Result
from tests.llm2clip.evaluation.made_results import RETRIEVAL, classification, retrieval, written

SIDES = ("image_to_text_recall@1", "text_to_image_recall@1")


def compared(*results: Result) -> Comparison:
    return compare([(Path(str(number)), result) for number, result in enumerate(results)])


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # nothing is wrapped


@pytest.fixture
def two_models(tmp_path: Path) -> list[str]:
    return written(
        tmp_path / "results",
        retrieval("openai/clip", t2i=0.556, i2t=0.683),
        retrieval("runs/mine", t2i=0.7712, i2t=0.6),
        retrieval("runs/mine", "docci", t2i=0.5, i2t=0.4),
        classification("openai/clip", 0.755),
    )


@pytest.mark.usefixtures("wide")
def test_the_table_and_the_differences(two_models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *two_models, "--baseline", "openai/clip"]) == 0
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "openai/clip 68.3 / 55.6 75.5" in lines
    assert "runs/mine 40.0 / 50.0 60.0 / 77.1" in lines, "long sets by name"
    assert "Difference from openai/clip, percentage points" in lines
    assert "runs/mine -8.3 / +21.5" in lines


@pytest.mark.usefixtures("wide")
def test_published_rows_are_shown_with_their_source(
    two_models: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"image_to_text_recall@1": 0.922, "text_to_image_recall@1": 0.933}
    rows = [PublishedRow("A [b]model[/b]", ("urban1k",), scores, {}, "A paper, v1", "table 1", "the prompts")]
    monkeypatch.setattr(report, "published_rows", lambda: rows)
    assert cli.main(["report", str(Path(two_models[0]).parent), "--paper"]) == 0
    shown = capsys.readouterr().out
    assert "A [b]model[/b] [1]" in shown
    assert "92.2 / 93.3" in shown
    assert "[1] A paper, v1; does not state the prompts" in shown
    assert cli.main(["report", *two_models]) == 0
    assert "A paper" not in capsys.readouterr().out
    rows.clear()
    assert cli.main(["report", *two_models, "--paper"]) == 0
    assert "no published scores are of these sets and protocols" in capsys.readouterr().err


def test_columns_that_do_not_fit_the_terminal_go_into_further_tables(
    two_models: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["report", *two_models]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Scores, %") == 3
    assert shown.count("runs/mine") == 2, "it has no result of ImageNet"
    assert max(map(len, shown.splitlines())) <= 40


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


def test_sources_have_the_same_numbers_in_every_table() -> None:
    comparison = compared(retrieval("a"))
    facts = [("one", "A paper", "the crop"), ("two", "Another paper", "the prompts"), ("three", "Another paper", "")]
    facts += [("four", "Another paper", "the prompts")]
    scores = dict.fromkeys(SIDES, 0.5)
    add_published(
        comparison, [PublishedRow(name, ("urban1k",), scores, {}, source, "", what) for name, source, what in facts]
    )
    page = as_markdown(comparison, comparison.baseline("one"))
    assert (
        "| model | Urban1k<br>I2T / T2I R@1 |\n| --- | ---: |\n| a | 25.0 / 50.0 |\n| one [1] | 50.0 / 50.0 |" in page
    )
    assert "| a | -25.0 / +0.0 |\n| two [2] | +0.0 / +0.0 |" in page
    assert "- [1] A paper; does not state the crop\n- [2] Another paper; does not state the prompts\n" in page


def test_a_page_has_the_scores_counts_and_parts_of_every_result() -> None:
    """The first one has recall@1 alone."""
    english, german = (
        {name: {SIDES[0]: i2t, SIDES[1]: t2i}} for name, i2t, t2i in (("en", 0.1, 0.2), ("de", 0.3, 0.4))
    )
    recall = {"title": "CRA", "scores": {"recall@1": 0.5}, "intervals": {}, "groups": {}}
    page = as_markdown(
        compared(
            retrieval("c", counts={}, groups={"language": german}, scores=dict.fromkeys(SIDES, 0.5), intervals={}),
            retrieval("a", counts={"images": 1000}, groups={}),
            retrieval("b", counts={"texts": 5}, groups={"language": english}),
            retrieval("d", "cra", **recall),
        ),
        None,
    )
    rows = [line for line in page.split("## Urban1k")[1].split("###")[0].splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| model", "| ---", "| c", "| a", "| b"]
    assert [row.split(" | ")[-2:] for row in rows] == [
        ["images", "texts |"], ["---:", "---: |"], ["", " |"], ["1,000", " |"], ["", "5 |"],
    ]  # fmt: skip
    assert rows[0].count("R@") == 6
    assert rows[2].startswith("| c | 50.0 | 50.0 |  |  |  |  |")
    assert "| language, I2T R@1 / T2I R@1 | c | b |" in page
    assert "| de | 30.0 / 40.0 |  |\n| en |  | 10.0 / 20.0 |" in page
    assert "CRA<br>R@1 |" in page


def test_sets_of_strangers_come_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = written(tmp_path / "with [brackets]", retrieval("a", "a-museum"), retrieval("a"), classification("a"))
    output = tmp_path / "page.md"
    assert cli.main(["report", str(Path(paths[0]).parent), "--output", str(output)]) == 0
    assert [line for line in output.read_text().splitlines() if line.startswith("## ")] == [
        "## Urban1k", "## ImageNet-1k (openai-80)", "## a-museum",
    ]  # fmt: skip


def test_bars_and_lines_show_the_scores() -> None:
    results = [retrieval("a", t2i=0.5), retrieval("b", t2i=0.6), retrieval("b", "docci", t2i=0.7), classification("a")]
    comparison = compared(*results)
    _, text_to_image, top1 = draw_models(comparison).axes
    bars = {bars.get_label(): [round(bar.get_height(), 6) for bar in bars] for bars in text_to_image.containers[1::2]}
    assert bars == {"a": [50.0], "b": [60.0, 70.0]}
    (first,), (second, _) = text_to_image.containers[1::2]
    assert first.get_x() + first.get_width() == pytest.approx(second.get_x()), "beside each other"
    (whisker,) = text_to_image.containers[0].lines[2][0].get_segments()
    assert whisker[:, 1].tolist() == pytest.approx([47.0, 52.0])
    assert [label.get_text() for label in text_to_image.get_xticklabels()] == ["Urban1k", "DOCCI"]
    assert [label.get_text() for label in top1.get_xticklabels()] == ["ImageNet-1k (openai-80)"]
    figure = draw_lengths(comparison)
    assert figure is not None
    urban, docci = figure.axes
    assert [label.get_text() for label in urban.get_xticklabels()] == ["17-32", "129-256", "513-"]
    lines = {line.get_label(): [round(float(value), 6) for value in line.get_ydata()] for line in urban.get_lines()}
    assert lines == {"a": [50.0, 60.0, 70.0], "b": [60.0, 70.0, 80.0]}
    assert docci.get_title() == "DOCCI"


def test_of_many_models_the_measured_ones_alone_are_drawn() -> None:
    comparison = compared(retrieval("a"), retrieval("b"))
    comparison.rows += [Row(f"p{number}", comparison.rows[0].cells, source="A paper") for number in range(10)]
    assert len(draw_models(comparison).axes[0].containers[1::2]) == 12
    comparison.rows.append(Row("one more", comparison.rows[0].cells, source="A paper"))
    bars = draw_models(comparison).axes[0].containers[1::2]
    assert [bar.get_label() for bar in bars] == ["a", "b"]


def test_long_titles_stay_inside_the_figures_and_do_not_overlap() -> None:
    differences = ["20 images instead of 1,000", "100 texts instead of 5,000"]
    results = [retrieval("a", name, title=name, differences=differences) for name in ("docci", "urban1k", "iiw")]
    results += [classification("a", differences=differences), retrieval("b")]
    comparison = compared(*results)
    for figure in (draw_models(comparison), draw_lengths(comparison)):
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


def test_without_lengths_there_is_no_plot_of_them(tmp_path: Path) -> None:
    files = written(tmp_path / "results", retrieval("a", groups={"length": {"0-16": {"text_to_image_recall@1": 0.5}}}))
    assert cli.main(["report", *files, "--output", str(tmp_path / "table.md")]) == 0
    assert not (tmp_path / "table-lengths.png").exists()
    assert "lengths" not in (tmp_path / "table.md").read_text()


def changed(**fields: Any) -> str:
    """The content of a file of a result, with other fields."""
    return json.dumps({**asdict(retrieval("a")), **fields})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "does not contain a JSON object"),
        (json.dumps({"schema_version": 99}), "schema version 1: it has version 99"),
        (json.dumps({"model": "runs/a", "task": "retrieval"}), "schema version 1: it has no version"),
        (json.dumps({"schema_version": 1, "benchmark": "a"}), "schema version 1: it lacks title, model, protocol, "),
        (changed(more=1), "schema version 1: it has the unknown fields more"),
        (changed(scores=None), "schema version 1: its scores are None"),
        (changed(scores={"accuracy": True}), "schema version 1: its scores are {'accuracy': True}"),
        (changed(scores={}), "schema version 1: it has no score"),
        (changed(scores={"accuracy": math.nan}), "schema version 1: its accuracy is nan"),
        (changed(counts={"images": "many"}), "schema version 1: its counts are {'images': 'many'}"),
        (changed(intervals={"accuracy": [0, "1"]}), "schema version 1: its intervals are "),
        (changed(groups={"length": {"0-16": 1}}), "schema version 1: its groups are "),
        (changed(model={"given": "a"}), "schema version 1: its model has no fingerprint"),
        (changed(model={}), "schema version 1: its model has no given and no fingerprint"),
    ],
)
def test_a_file_that_is_no_result_is_one_error(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    assert cli.main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error


def test_mistakes_end_in_one_error(two_models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*arguments: str) -> str:
        assert cli.main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "llm2clip report results/*.json" in error_of()
    assert f"no result file {tmp_path / 'none.json'}" in error_of(str(tmp_path / "none.json"))
    (tmp_path / "empty").mkdir()
    assert "no result file" in error_of(str(tmp_path / "empty"))
    assert "did you mean 'openai/clip'" in error_of(*two_models, "--baseline", "openai/clap")
    assert "ends in .md" in error_of(*two_models, "--output", str(tmp_path / "table.html"))
    (tmp_path / "file").touch()
    assert "cannot be a folder" in error_of(*two_models, "--output", str(tmp_path / "file" / "table.md"))
    twice = written(tmp_path / "twice", retrieval("openai/clip", t2i=0.557))
    assert "but differ" in error_of(*two_models, *twice)


def test_a_file_that_is_named_twice_is_one_result(two_models: list[str]) -> None:
    folder = Path(two_models[0]).parent
    for names in ([two_models[0], str(folder)], [str(folder / "*.json")], two_models):
        assert [str(path) for path, _ in report.read_results(names)] == two_models


def test_results_of_two_text_formats_are_two_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lower = retrieval("b", protocol={**RETRIEVAL, "text_format": "lower"})
    assert cli.main(["report", *written(tmp_path / "results", retrieval("a"), lower)]) == 0
    shown = capsys.readouterr().out
    assert "(text format raw)" in shown
    assert "(text format lower)" in shown
