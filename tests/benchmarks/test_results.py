"""What `make bench` writes and reports."""

import benchmarks.__main__ as command
from benchmarks import results


def test_the_command_writes_results_and_reports_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command, "row_modules", lambda: {"R99": "tests.benchmarks.tiny_row"})
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(results, "TABLE", tmp_path / "RESULTS.md")
    assert command.main(["R99"]) == 1
    assert "FAILED  R99, unequal: sum: ours differs" in capfd.readouterr().err
    (kept,) = results.read().values()
    results.write(kept)
    assert len(results.RESULTS.read_text().splitlines()) == 1
    results.write({**kept, "contest": "no row has this any more"})
    assert command.main(["--table"]) == 0
    text = results.TABLE.read_text()
    assert "| 🟢 | R99 | sums: equal | memory |" in text
    assert "| 🟡 |  |  | bytes |" in text
    assert "- R99: no reason is given yet." in text
    assert "no row has this any more" not in text
