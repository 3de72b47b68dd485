"""`llm2clip check-data`: every fault of an awkward data set is found, by row, in every form of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip import cli
from llm2clip.checks.check_data import check_data
from llm2clip.data import CaptionSource
from tests.builders.tables import write_table
from tests.llm2clip.data.conftest import CONCEPTS, png
from tests.tars import write_tar

GARBLED = "Lézard".encode().decode("cp1252")
# Key, image, and captions. 21 x 20 pixels are above max_pixels.
ROWS: list[tuple[str, bytes | None, list[str]]] = [
    ("sound", png(1, (20, 18)), ["a dog", "a small dog that runs"]),
    ("repeated", png(2, (10, 18)), ["a dog", "A  Dog "]),
    ("empty", png(3, (20, 18)), ["  ", ""]),
    ("entity", png(4, (20, 18)), ["Grampa&#39;n Gramma", "a [bold]b[/bold] &amp; c"]),
    ("control", png(5, (20, 18)), ["a\x1b[31mcat", "caf\ufffd"]),
    ("garbled", png(6, (20, 18)), [GARBLED, "面白い猫"]),
    ("missing", None, ["кот"]),
    ("broken", png(7)[:60], ["<b>a cat</b>"]),
    ("zero", b"", ["12"]),
    ("large", png(8, (21, 20)), ["a large cat"]),
]
MAX_PIXELS = 400


def rows_found(report: dict[str, Any], finding: str) -> list[str]:
    found = report["findings"][finding]
    assert found["count"] == len(found["examples"]), "fewer than the number of examples"
    return sorted(example["key"] for example in found["examples"])


# Keys of the rows by finding, and whether it stops a training.
FOUND = {
    "no caption": (["empty"], True),
    "captions that are not text": ([], True),
    "repeated captions": (["repeated"], False),
    "HTML entities": (["entity", "entity"], False),
    "HTML tags": (["broken"], False),
    "control characters": (["control"], False),
    "U+FFFD": (["control"], False),
    "mojibake": (["garbled"], False),
    "missing images": (["missing"], True),
    "broken images": (["broken", "zero"], True),
    "images above max_pixels": (["large"], True),
}


def check(report: dict[str, Any]) -> None:
    """Compare with what is in ROWS."""
    assert (report["rows"], report["usable_rows"]) == (10, 5)
    captions = report["captions"]
    assert (captions["count"], captions["distinct"]) == (14, 13)
    assert captions["distinct_ignoring_case_and_space"] == 12
    assert captions["scripts"] == {"latin": 11, "kana": 1, "cyrillic": 1, "none": 1}
    assert report["images"] == {
        "count": 6,
        "width": {"min": 10, "median": 20, "p95": 20, "max": 20},
        "height": {"min": 18, "median": 18, "p95": 18, "max": 18},
    }
    findings = report["findings"]
    assert {name: (rows_found(report, name), findings[name]["stops"]) for name in findings} == FOUND


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    keys, images, captions = zip(*ROWS, strict=True)
    columns = {"key": keys, "image": images, "caption": captions}
    return write_table(tmp_path_factory.mktemp("awkward") / "rows.parquet", columns)


@pytest.fixture(scope="module")
def forms(parquet: str) -> dict[str, str]:
    """The data in a table, in tars and in a table of paths."""
    folder = Path(parquet).parent
    # `datasets` refuses tars that lack a file in one of the first five rows.
    for shard, rows in enumerate((ROWS[:6], ROWS[6:])):
        files = []
        for key, image, captions in rows:
            record = json.dumps({"captions": captions}).encode()
            contents = {"png": image, "json": record}
            files += [(f"{key}.{suffix}", data) for suffix, data in contents.items() if data is not None]
        write_tar(folder / "tars" / f"{shard}.tar", files)
    for key, image, _ in ROWS:
        if image is not None:
            (folder / f"{key}.png").write_bytes(image)
    keys, _, texts = zip(*ROWS, strict=True)
    columns = {"key": keys, "image": [f"{key}.png" for key in keys], "caption": texts}
    return {"parquet": parquet, "tars": f"{folder}/tars", "paths": write_table(folder / "rows.json", columns)}


@pytest.mark.parametrize(
    ("form", "streaming", "num_workers"),
    [("parquet", False, 0), ("parquet", True, 2), ("tars", False, 2), ("tars", True, 0), ("paths", True, 0)],
)
def test_every_fault_is_found_in_every_form(
    form: str, streaming: bool, num_workers: int, forms: dict[str, str]
) -> None:
    column = "json.captions" if form == "tars" else "caption"
    source = CaptionSource(forms[form], caption_columns=[column], streaming=streaming)
    report = check_data(source, max_pixels=MAX_PIXELS, num_workers=num_workers)
    check(report)
    assert report["captions"]["columns"] == {
        column: {"rows": 9, "captions": 14, "words": {"min": 1, "median": 2, "p95": 5, "max": 5}}
    }
    (large,) = report["findings"]["images above max_pixels"]["examples"]
    assert large["detail"] == "21 x 20 pixels"


def test_the_command_prints_and_writes_the_report_and_ends_with_status_1(
    parquet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")  # no detail is wrapped
    before = Path(parquet).read_bytes()
    arguments = ["check-data", parquet, "--max-pixels", str(MAX_PIXELS), "--num-workers", "0"]
    assert cli.main([*arguments, "--output", str(tmp_path / "report.json")]) == 1
    shown, error = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    check(report)
    assert (report["data"]["path"], report["data"]["caption_columns"]) == (parquet, ["caption"])
    assert len(report["data"]["revision"]) == 16
    assert "10, of which 5 can be used" in shown
    assert "a [bold]b[/bold] &amp; c" in shown
    assert "\x1b" not in shown
    assert r"a\u001b[31mcat" in shown
    assert "5 of 10 rows cannot be used" in error
    assert "Traceback" not in error
    assert Path(parquet).read_bytes() == before
    assert cli.main([*arguments, "--on-error", "skip"]) == 0


def test_captions_alone(parquet: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = CaptionSource(parquet)
    report = check_data(source, with_images=False, num_workers=0)
    assert report["images"] is None
    assert (report["rows"], report["usable_rows"]) == (10, 9)
    assert not any("image" in name for name in report["findings"])
    assert cli.main(["check-data", parquet, "--no-images", "--max-samples", "2"]) == 0
    assert "not read" in capsys.readouterr().out


def test_options_replace_the_fields_of_the_mapping(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = json.dumps({"path": CONCEPTS, "split": "train", "caption_columns": ["keywords"], "max_samples": 20})
    options = ["--split", "test", "--caption-columns", "caption", "caption_de", "--streaming", "--num-workers", "2"]
    assert cli.main(["check-data", source, *options, "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    fields = {name: report["data"][name] for name in ("split", "caption_columns", "max_samples", "streaming")}
    assert fields == {
        "split": "test", "caption_columns": ["caption", "caption_de"], "max_samples": 20, "streaming": True,
    }  # fmt: skip
    assert report["rows"] == report["images"]["count"] == 20
    assert list(report["captions"]["columns"]) == ["caption", "caption_de"]


def test_rows_that_are_not_text_and_data_without_a_usable_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_table(tmp_path / "numbers.parquet", {"caption": [1, 2]})
    assert cli.main(["check-data", path, "--no-images", "--on-error", "skip"]) == 1
    assert "2 of 2 rows cannot be used" in capsys.readouterr().err
    report = check_data(CaptionSource(path), with_images=False, num_workers=0)
    assert [example["key"] for example in report["findings"]["captions that are not text"]["examples"]] == ["0", "1"]
    assert report["captions"]["columns"]["caption"]["words"] is None
    datasets.Dataset.from_dict({"caption": ["a"]}).select([]).to_parquet(str(tmp_path / "none.parquet"))
    assert cli.main(["check-data", str(tmp_path / "none.parquet"), "--no-images", "--streaming"]) == 1
    assert "has no rows" in capsys.readouterr().err


def test_data_that_cannot_be_read_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-data", str(tmp_path / "nothing.parquet")]) == 2
    assert "There is no file or folder" in capsys.readouterr().err
    assert cli.main(["check-data", CONCEPTS, "--caption-columns", "captions"]) == 2
    assert "has no column 'captions'" in capsys.readouterr().err
    assert cli.main(["check-data"]) == 2
    assert "check-data SOURCE, or --benchmark NAME" in capsys.readouterr().err
