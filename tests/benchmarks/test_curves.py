"""The work of the curves at a small size, and their plots."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.curves import plots, points


def test_mixed_captions_have_the_given_share_of_long_captions() -> None:
    for share in (0, 20, 100):
        lengths = [len(caption.split()) - 1 for caption in points.mixed_captions(share)]
        long = sum(length >= points.LONG[0] for length in lengths)
        assert len(lengths) == points.CAPTIONS
        assert long == pytest.approx(share / 100 * points.CAPTIONS, abs=1)
        assert long + sum(length <= points.SHORT[1] for length in lengths) == points.CAPTIONS


@pytest.mark.parametrize(("index_type", "least"), [("flat", 0.999), ("ivf_rq", 0.9), ("faiss", 0.9)])
def test_an_index_finds_the_best_vectors(index_type: str, least: float) -> None:
    metrics = points.search_work(index_type, 3000)().metrics
    assert metrics["found"] >= least
    assert set(metrics) == {"search", "build", "found"}


@pytest.mark.parametrize("curve", list(points.CURVES))
def test_every_curve_is_plotted(curve: str, tmp_path: Path) -> None:
    figures = {"memory": 2e6, "cpu": 3.0, "search": 1e-3, "build": 2.0, "found": 0.9}
    lines = {
        name: [(x, {key: value * x for key, value in figures.items()}) for x in points.CURVES[curve].quick]
        for name in points.CURVES[curve].lines
    }
    plots.draw(curve, lines, "a machine", tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 600
