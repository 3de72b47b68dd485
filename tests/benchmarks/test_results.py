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


def test_a_record_contains_the_fields_of_the_table(entry):
    assert [goal["ratio"] for goal in entry["goals"]] == [0.25, 0.25, 2.0]
    assert entry["figures"]["ours"] == {"cpu": 1.0, "wall": 1.0, "memory": 10.0, "bytes": 1.0}
    assert entry["limits"] == ["nothing"]
    assert entry["versions"]["torch"]
    assert json.loads(json.dumps(entry)) == entry


def test_the_newest_record_of_a_contest_is_used(entry):
    newer = slower(entry, 2)
    assert results.read([json.dumps(entry), "", json.dumps(newer)]) == {KEY: newer}


def test_a_ratio_that_is_a_fifth_worse_is_marked(entry):
    text = results.table({KEY: slower(entry, 1.2)}, {KEY: entry}, {})
    assert "| 🔴 | R99 | sums: equal | memory |" in text
    assert f"memory against peer was 0.25 × in {entry['commit']}" in text


def test_a_ratio_within_the_noise_is_not_marked(entry):
    assert "| 🔴" not in results.table({KEY: slower(entry, 1.05)}, {KEY: entry}, {})


def test_records_of_other_machines_are_not_compared(entry):
    assert results.worse(slower(entry, 2), {**entry, "machine": "another"}) == []


def test_the_last_committed_record_of_the_same_machine_is_compared(entry, monkeypatch):
    elsewhere = {**slower(entry, 3), "machine": "another"}
    committed = "\n".join(map(json.dumps, (entry, elsewhere)))
    monkeypatch.setattr(results, "_git", lambda *arguments: committed)
    assert results.committed(entry["machine"]) == {KEY: entry}


def test_the_environments_of_peers_are_listed(entry):
    text = results.table({KEY: {**entry, "peers": {"llm2vec": {"torch": "1.2.3"}}}}, {}, {})
    assert "llm2vec in an environment with torch 1.2.3" in text


def test_a_missed_goal_is_listed_with_its_reason(entry):
    text = results.table({KEY: entry}, {}, {"R99": "the peer is asleep."})
    assert "| 🟢 | R99 | sums: equal | memory | 0.0 MiB | peer | 0.0 MiB | 0.25 | ≤ 0.50 |" in text
    assert "| 🟡 | R99 | sums: equal | bytes |" in text
    assert "*limit:* nothing" in text
    assert "- R99: the peer is asleep." in text
    assert "no reason is given yet" in results.table({KEY: entry}, {}, {})


def test_a_limit_without_a_goal_is_listed(entry):
    entry["goals"] = entry["goals"][:1]
    text = results.table({KEY: entry}, {}, {})
    assert "|  | R99 | sums: equal | cpu | 1 s | *limit:* nothing | 0.5 s | 2.00 |  |" in text


def test_the_command_writes_results_and_reports_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command, "row_modules", lambda: {"R99": "tests.benchmarks.tiny_row"})
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(results, "TABLE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results, "committed", lambda machine: {})
    assert command.main(["R99"]) == 1
    assert "FAILED  R99, unequal: sum: ours differs" in capfd.readouterr().err
    (kept,) = [json.loads(line) for line in results.lines()]
    assert kept["contest"] == "equal"
    assert "| R99 | sums: equal |" in results.TABLE.read_text()
    gone = {**kept, "contest": "no row has this any more"}
    results.append(gone)

    before = copy.deepcopy(kept)
    for goal in before["goals"]:
        goal["ratio"] /= 1.2
    monkeypatch.setattr(results, "committed", lambda machine: {KEY: before})
    assert command.main(["--table"]) == 0
    assert "| 🔴 |" in results.TABLE.read_text()
    assert "no row has this any more" not in results.TABLE.read_text()

    equal_only = tiny_row.contests("cpu")[:1]
    monkeypatch.setattr(tiny_row, "ROW", results.Row("R99", "sums", lambda device: equal_only))
    assert command.main([]) == 3
    assert "WORSE   R99, equal: bytes against peer was" in capfd.readouterr().err


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["R77"])
    assert "there is no row R77; choose from R" in capsys.readouterr().err


def test_gpu_rows_are_skipped_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(command, "_has_cuda", lambda: False)
    assert command.main(["--device", "cuda"]) == 0
    assert "there is no CUDA device" in capsys.readouterr().out


README_LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "README.md").read_text().splitlines()
    if line.startswith("| R")
]


@pytest.mark.parametrize("cells", README_LINES, ids=[f"{cells[0]} {cells[1]}" for cells in README_LINES])
def test_the_readme_shows_the_measured_ratios(cells):
    row, _, against, time, memory = cells
    shown = {"cpu": time, "memory": memory}
    measured = [
        {goal["metric"]: results._number(goal["ratio"]) for goal in entry["goals"] if goal["against"] == against}
        for (name, _, device), entry in results.read(results.lines()).items()
        if name == row and device == "cpu"
    ]
    shown = {metric: ratio for metric, ratio in shown.items() if ratio}
    assert any(shown.items() <= ratios.items() for ratios in measured)


def test_the_readme_shows_a_row_that_is_lost():
    times = [float(cells[3]) for cells in README_LINES if cells[3]]
    assert max(times) > 1
