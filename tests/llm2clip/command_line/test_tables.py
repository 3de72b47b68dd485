"""Tables in Markdown keep their columns whatever a cell contains; those of recalls have both sides of a training."""

from __future__ import annotations

import pytest

from llm2clip.command_line.tables import markdown_table, print_values


def test_a_cell_with_a_bar_or_a_newline_stays_one_cell() -> None:
    assert markdown_table(["model", "prompt\nof it", "width"], [["a|b", "`<|end|>`", 8]], range(2)).split("\n") == [
        "| model | prompt<br>of it | width |",
        "| --- | --- | ---: |",
        r"| a\|b | `<\|end\|>` | 8 |",
    ]


def test_the_recalls_of_a_set_before_training_stand_above_those_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"before_training_a_recall@1": 0.07, "before_training_b_recall@1": 0.1}
    print_values({"train_loss": 2.5, **before, "eval_a_recall@1": 0.21, "eval_b_recall@1": 0.3})
    lines = [line.strip(" │").split("│") for line in capsys.readouterr().out.splitlines()]
    rows = [tuple(cell.strip() for cell in line) for line in lines if len(line) == 2]
    assert rows == [("a, before training", "7.0"), ("a", "21.0"), ("b, before training", "10.0"), ("b", "30.0")]
