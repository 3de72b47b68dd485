"""The curves of the report."""

from __future__ import annotations

from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.image_steps import BEST_BY
from llm2clip.quickstart.report import draw_curves


def test_the_chosen_model_is_no_point_of_the_curve() -> None:
    """It is measured after the last step, which has a value of its own."""
    history = [{"step": 1, "loss": 2.0}, {"step": 1, BEST_BY: 0.3}, {"step": 2, BEST_BY: 0.1}]
    runs = {"stage2-raw": {"frozen": {"history": [*history, {"step": 2, BEST_BY: 0.3}]}}}
    figure = draw_curves(runs, [Arm("raw", "raw LLM", "raw")])
    (line,) = [line for axis in figure.axes for line in axis.lines if "validation" in axis.get_title()]
    assert line.get_xydata().tolist() == [[1, 30], [2, 10]]
