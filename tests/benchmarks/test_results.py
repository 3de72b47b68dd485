"""What `make bench` writes and reports, and the ratios that the README shows."""

import copy
import json

import pytest

import benchmarks.__main__ as command
from benchmarks import results
from benchmarks.contest import ROOT
from tests.benchmarks import tiny_row

TURNS = {
    "ours": [{"cpu": 1.0, "wall": 1.0, "memory": 10.0, "bytes": 1.0}] * 2,
    "peer": [{"cpu": 2.0, "wall": 2.0, "memory": 40.0, "bytes": 4.0}] * 2,
    "nothing": [{"cpu": 0.5, "wall": 0.5, "memory": 1.0, "bytes": 0.0}] * 2,
}
KEY = ("R99", "equal", "cpu")


@pytest.fixture
def entry():
    return results.record(tiny_row.ROW, tiny_row.contests("cpu")[0], "cpu", TURNS)


def slower(entry, factor):
    changed = copy.deepcopy(entry)
    for goal in changed["goals"]:
        goal["ratio"] *= factor
    return changed


def test_the_table_marks_what_is_reached_missed_and_worse_than_before(entry):
    text = results.table({KEY: entry}, {KEY: slower(entry, 1 / 1.05)}, {"R99": "the peer is asleep."})
    assert "| 🟢 | R99 | sums: equal | memory | 0.0 MiB | peer | 0.0 MiB | 0.25 | ≤ 0.50 |" in text
    assert "| 🟡 | R99 | sums: equal | bytes |" in text
    assert "- R99: the peer is asleep." in text
    assert "| 🔴" not in text
    worse = results.table({KEY: slower(entry, 1.2)}, {KEY: entry}, {})
    assert "| 🔴 | R99 | sums: equal | memory |" in worse
    assert f"memory against peer was 0.25 × in {entry['commit']}" in worse
    assert "no reason is given yet" in worse


def test_the_last_committed_record_of_the_same_machine_is_compared(entry, monkeypatch):
    elsewhere = {**slower(entry, 3), "machine": "another"}
    committed = "\n".join(map(json.dumps, (slower(entry, 2), entry, elsewhere)))
    monkeypatch.setattr(results, "_git", lambda *arguments: committed)
    assert results.committed(entry["machine"]) == {KEY: entry}
    assert results.worse(slower(entry, 2), elsewhere) == []


def test_the_command_writes_results_and_reports_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command, "row_modules", lambda: {"R99": "tests.benchmarks.tiny_row"})
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(results, "TABLE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results, "committed", lambda machine: {})
    assert command.main(["R99"]) == 1
    assert "FAILED  R99, unequal: sum: ours differs" in capfd.readouterr().err
    (kept,) = [json.loads(line) for line in results.lines()]
    results.append({**kept, "contest": "no row has this any more"})
    monkeypatch.setattr(results, "committed", lambda machine: {KEY: slower(kept, 1 / 1.2)})
    assert command.main(["--table"]) == 0
    assert "| 🔴 | R99 | sums: equal |" in results.TABLE.read_text()
    assert "no row has this any more" not in results.TABLE.read_text()
    equal_only = tiny_row.contests("cpu")[:1]
    monkeypatch.setattr(tiny_row, "ROW", results.Row("R99", "sums", lambda device: equal_only))
    assert command.main([]) == 3
    assert "WORSE   R99, equal: bytes against peer was" in capfd.readouterr().err


README_LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "README.md").read_text().splitlines()
    if line.startswith("| R")
]


def test_the_readme_shows_the_measured_ratios_and_a_row_that_is_lost():
    measured = [
        (row, {(goal["against"], goal["metric"]): results._number(goal["ratio"]) for goal in entry["goals"]})
        for (row, _, device), entry in results.read(results.lines()).items()
        if device == "cpu"
    ]
    for row, _, against, time, memory in README_LINES:
        shown = {(against, metric): ratio for metric, ratio in (("cpu", time), ("memory", memory)) if ratio}
        assert any(name == row and shown.items() <= ratios.items() for name, ratios in measured), (row, against)
    assert max(float(cells[3]) for cells in README_LINES if cells[3]) > 1
