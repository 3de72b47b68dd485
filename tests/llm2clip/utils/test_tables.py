"""Tables in Markdown keep their columns whatever a cell contains."""

from __future__ import annotations

from llm2clip.utils.tables import markdown_table


def test_a_cell_with_a_bar_or_a_newline_stays_one_cell() -> None:
    assert markdown_table(["model", "prompt\nof it", "width"], [["a|b", "`<|end|>`", 8]], range(2)).split("\n") == [
        "| model | prompt<br>of it | width |",
        "| --- | --- | ---: |",
        r"| a\|b | `<\|end\|>` | 8 |",
    ]
