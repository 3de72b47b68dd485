"""Tables in Markdown keep their columns whatever a cell contains."""

from __future__ import annotations

import pytest

from llm2clip.utils.tables import markdown_table, print_values


def test_a_cell_with_a_bar_or_a_newline_stays_one_cell() -> None:
    assert markdown_table(["model", "prompt\nof it", "width"], [["a|b", "`<|end|>`", 8]], range(2)).split("\n") == [
        "| model | prompt<br>of it | width |",
        "| --- | --- | ---: |",
        r"| a\|b | `<\|end\|>` | 8 |",
    ]


def test_recalls_of_all_commands_are_one_table_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    sides = {f"{side}_recall@{k}": k / 20 for side in ("text_to_image", "image_to_text") for k in (1, 10)}
    trained = {f"eval_{name}_{score}": value for name in ("a_b", "c") for score, value in sides.items()}
    print_values({"train_loss": 0.25, **trained, "eval_words_recall@1": 1.0, "number": 7})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["train_loss: 0.2500", "number: 7"]
    cells = [[cell.strip() for cell in line.strip("│┃").split("┃" if "┃" in line else "│")] for line in lines]
    assert ["set", "T2I R@1 / 10", "I2T R@1 / 10"] in cells
    assert [row for row in cells if row[0] in ("a_b", "c", "words")] == [
        ["a_b", "5.0 / 50.0", "5.0 / 50.0"],
        ["c", "5.0 / 50.0", "5.0 / 50.0"],
        ["words", "100.0"],
    ]
