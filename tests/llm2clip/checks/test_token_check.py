"""The captions that a tokenizer cuts are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip import cli
from llm2clip.checks.check_data import check_data
from llm2clip.data import CaptionSource
from tests.builders.tables import write_table
from tests.llm2clip.checks.tokenizers import save_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> str:
    captions = [["one two three"], ["one two three four", "a"], ["one two three four five six"]]
    return write_table(tmp_path / "captions.parquet", {"caption": captions, "key": ["a", "b", "c"]})


def test_captions_are_counted_by_each_tokenizer(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.checks.token_check.BATCH", 2)
    five = save_tokenizer(tmp_path / "five", 5)
    endless = save_tokenizer(tmp_path / "endless", None)
    report = check_data(
        CaptionSource(data), with_images=False, num_workers=0, tokenizers=[five, f"{endless}:4", f"{five}:100"]
    )
    # The final token counts.
    length = {"min": 2, "median": 4, "p95": 7, "max": 7}
    assert report["tokens"] == {
        five: {"limit": 5, "cut": 1, "length": length},
        f"{endless}:4": {"limit": 4, "cut": 2, "length": length},
        f"{five}:100": {"limit": 100, "cut": 0, "length": length},
    }
    finding = report["findings"][f"captions cut by {endless}:4"]
    assert [example["key"] for example in finding["examples"]] == ["b", "c"]
    assert finding["examples"][0]["detail"] == "5 tokens: one two three four"
    assert not finding["stops"]


def test_the_command_prints_them(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    five, endless = save_tokenizer(tmp_path / "five", 5), save_tokenizer(tmp_path / "endless", None)
    assert cli.main(["check-data", data, "--no-images", "--tokenizer", five]) == 0
    assert "cut captions" in capsys.readouterr().out
    assert cli.main(["check-data", data, "--no-images", "--tokenizer", endless]) == 2
    assert f"--tokenizer {endless}:512" in capsys.readouterr().err
    assert cli.main(["check-data", data, "--no-images", "--tokenizer", str(tmp_path / "nothing")]) == 2
