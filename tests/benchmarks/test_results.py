"""What `make bench` writes and reports, and the ratios that the README shows."""

import benchmarks.__main__ as command
from benchmarks import results
from benchmarks.contest import ROOT


def test_the_command_writes_results_and_reports_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command, "row_modules", lambda: {"R99": "tests.benchmarks.tiny_row"})
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(results, "TABLE", tmp_path / "RESULTS.md")
    assert command.main(["R99"]) == 1
    assert "FAILED  R99, unequal: sum: ours differs" in capfd.readouterr().err
    (kept,) = results.read().values()
    results.append({**kept, "contest": "no row has this any more"})
    assert command.main(["--table"]) == 0
    text = results.TABLE.read_text()
    assert "| 🟢 | R99 | sums: equal | memory |" in text
    assert "| 🟡 | R99 | sums: equal | bytes |" in text
    assert "- R99: no reason is given yet." in text
    assert "no row has this any more" not in text


README_LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "README.md").read_text().splitlines()
    if line.startswith("| R")
]


def test_the_readme_shows_the_measured_ratios_and_a_row_that_is_lost():
    measured = [
        (row, {(goal["against"], goal["metric"]): results._number(goal["ratio"]) for goal in entry["goals"]})
        for (row, _, device), entry in results.read().items()
        if device == "cpu"
    ]
    for row, _, against, time, memory in README_LINES:
        shown = {(against, metric): ratio for metric, ratio in (("cpu", time), ("memory", memory)) if ratio}
        assert any(name == row and shown.items() <= ratios.items() for name, ratios in measured), (row, against)
    assert max(float(cells[3]) for cells in README_LINES if cells[3]) > 1
