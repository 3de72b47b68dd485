"""The plot of a report: lines show the scores, and nothing overlaps."""

from __future__ import annotations

from llm2clip.evaluation.plots import draw_lengths
from llm2clip.evaluation.report import compare_results
from tests.llm2clip.evaluation.made_results import classification, retrieval


def test_lines_show_the_scores() -> None:
    results = [retrieval("a", t2i=0.5), retrieval("b", t2i=0.6), retrieval("b", "docci", t2i=0.7), classification("a")]
    figure = draw_lengths(compare_results(results))
    assert figure is not None
    docci, urban = figure.axes
    assert [label.get_text() for label in urban.get_xticklabels()] == ["17-32", "129-256", "513-"]
    lines = {line.get_label(): [round(float(value), 6) for value in line.get_ydata()] for line in urban.get_lines()}
    assert lines == {"a": [50.0, 60.0, 70.0], "b": [60.0, 70.0, 80.0]}
    assert docci.get_title() == "DOCCI"


def test_long_titles_stay_inside_the_figure_and_do_not_overlap() -> None:
    differences = ["20 images instead of 1,000", "100 texts instead of 5,000"]
    results = [retrieval("a", name, title=name, differences=differences) for name in ("docci", "urban1k", "iiw")]
    figure = draw_lengths(compare_results([*results, retrieval("b")]))
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
