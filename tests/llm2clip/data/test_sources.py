from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.checks.check_data import check_data
from llm2clip.data import CaptionSource, PairSource, StreamingCaptionImageDataset, distinct_captions, load_source
from llm2clip.data.formats import SourceError
from llm2clip.data.rows import column_texts
from llm2clip.data.shards import ShardedSource
from llm2clip.data.transforms import decode_image
from llm2clip.search.table_items import TableImages
from tests.tars import write_tar

from .conftest import CONCEPTS, ROWS, captions

FORMS = {
    "csv file": ("csv/data.csv", ["caption"]),
    "tsv file": ("csv/data.tsv", ["caption"]),
    "jsonl file": ("csv/data.jsonl", ["caption"]),
    "json file": ("csv/data.json", ["caption"]),
    "image folder": ("imagefolder", ["caption"]),
    "webdataset folder": ("webdataset", ["json.caption", "json.nested.long"]),
    "webdataset glob": ("webdataset/*.tar", ["json.caption"]),
    "one tar": ("webdataset/00000.tar", ["json.caption"]),
    "parquet of bytes": ("bytes.parquet", ["caption"]),
    "saved data set": ("saved", ["caption"]),
    "saved splits": ("saved_splits", ["caption"]),
}


def _shade(value: object) -> int:
    return decode_image(value, "x").getpixel((0, 0))[0]


@pytest.mark.parametrize(
    ("form", "streaming"),
    [(form, streaming) for form in FORMS for streaming in ([False] if "saved" in form else [False, True])],
)
def test_all_formats_give_the_same_encoded_images_and_captions(made: Path, form: str, streaming: bool) -> None:
    path, columns = FORMS[form]
    table = load_source(CaptionSource(str(made / path), caption_columns=columns, streaming=streaming))
    assert isinstance(table, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = list(table)
    assert len(rows) == (3 if form == "one tar" else ROWS)
    image = "png" if "tar" in form or "webdataset" in form else "image"
    for number, row in enumerate(rows):
        assert not hasattr(row[image], "getpixel"), "images must not be decoded by datasets"
        assert _shade(row[image]) == number
        texts = [text for column in columns for text in column_texts(row, column)]
        assert texts == captions(number)[: len(texts)]


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_used_columns_are_read(streaming: bool) -> None:
    source = CaptionSource(CONCEPTS, split="test", caption_columns=["keywords", "caption_de"], streaming=streaming)
    assert set(load_source(source).column_names) == {"key", "image", "keywords", "caption_de"}
    assert set(load_source(source, with_images=False).column_names) == {"key", "keywords", "caption_de"}


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_and_max_samples_choose_rows(streaming: bool) -> None:
    whole = load_source(CaptionSource(CONCEPTS, split="train[:10]+test"), with_images=False)
    assert len(whole) == 10 + 695
    source = CaptionSource(CONCEPTS, split="test", streaming=streaming, max_samples=7)
    assert [row["key"] for row in load_source(source, with_images=False)] == whole[10:17]["key"]


def test_error_for_missing_columns_lists_the_existing_columns(made: Path) -> None:
    source = CaptionSource(CONCEPTS, caption_columns=["captions", "caption"], image_column="picture", key_column="id")
    with pytest.raises(
        SourceError, match=r"no columns 'picture', 'captions', 'id'; it has key, .*Did you mean 'caption'"
    ):
        load_source(source)
    with pytest.raises(
        SourceError, match=r"it has png, json, json\.caption, json\.nested, json\.nested\.long, __key__"
    ):
        load_source(CaptionSource(str(made / "webdataset"), caption_columns=["txt"]))
    with pytest.raises(SourceError, match=r"metadata\.jsonl"):
        load_source(CaptionSource(str(made / "csv")))
    with pytest.raises(SourceError, match=r"Column 'caption' of .* contains List.*, not images"):
        load_source(CaptionSource(str(made / "bytes.parquet"), image_column="caption"))


def test_relative_image_paths_with_several_folders_are_rejected(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.csv").write_text("image,caption\n1.png,text\n")
    with pytest.raises(SourceError, match=r"'1\.png' of .* is relative, but the data files are in 2 folders"):
        load_source(CaptionSource(str(tmp_path / "*" / "data.csv")))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/file.parquet", "no file or folder 'no/such/file.parquet'"),
        ("nowhere", "not the id of a data set on the Hub"),
        ("shards/*.tar", r"No file matches 'shards/\*.tar'"),
        ("owner/name", "Hub cannot be reached"),
    ],
)
def test_error_for_a_path_that_does_not_exist_names_it(path: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_source(CaptionSource(path))


def test_error_for_an_unknown_split_lists_the_splits(made: Path) -> None:
    saved = str(made / "saved_splits")
    for path, streaming, splits in (
        (CONCEPTS, False, "train, validation, test"),
        (CONCEPTS, True, "train, validation, test"),
        (saved, False, "train, test"),
    ):
        with pytest.raises(SourceError, match=f"no split 'dev'; it has {splits}"):
            load_source(CaptionSource(path, split="dev", streaming=streaming))


def test_errors_for_unreadable_and_unsupported_files_name_them(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match=r"Reading .*broken\.parquet failed"):
        load_source(CaptionSource(str(tmp_path / "broken.parquet")))
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"one format out of \.parquet.*'\.docx'"):
        load_source(CaptionSource(str(tmp_path / "notes.docx")))


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "stream"])
def test_a_name_like_a_pattern_is_the_name_of_one_file(streaming: bool, tmp_path: Path) -> None:
    for name in ("a[1].csv", "a1.csv", "b*.csv", "bc.csv", "[2] d/e.csv", "2 d/e.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"caption\n{name}\n")

    def read(name: str) -> list[str]:
        return distinct_captions(CaptionSource(str(tmp_path / name), streaming=streaming), False)

    for name in ("a[1].csv", "b*.csv", "[2] d/e.csv"):
        assert read(name) == [name]
    assert read("[[]2] d/*.csv") == ["[2] d/e.csv"]
    assert read("[ab]*.csv") == ["a1.csv", "a[1].csv", "b*.csv", "bc.csv"]
    with pytest.raises(SourceError, match="takes for a pattern; rename it"):
        read("[2] d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image;caption\na.png;grün\n".encode(), "the separator of .* seems to be ';'"),
        ("image\tcaption\na.png\tgrün\n".encode(), "seems to be a tab"),
        ("image,caption\na.png,grün\n".encode("cp1252"), "is not in UTF-8 .*'CSV UTF-8"),
        ("image,caption\na.png,grün\n".encode("utf-16"), "is not in UTF-8 .*'CSV UTF-8"),
    ],
    ids=["semicolons", "tabs", "cp1252", "UTF-16"],
)
def test_a_table_of_excel_is_refused_with_what_to_do(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        load_source(CaptionSource(str(tmp_path / "data.csv")))


def test_captions_that_pandas_reads_as_missing_are_kept(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("image,caption\na.png,nan\nb.png,None\nc.png,\n")
    for path in ("data.csv", ""):
        rows = list(load_source(CaptionSource(str(tmp_path / path)), with_images=False))
        assert [row["caption"] for row in rows] == ["nan", "None", None]


def test_what_only_the_hub_has_is_refused_here(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"caption": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("a")
    for path, name in (("saved", "revision"), ("saved", "name"), ("a.txt", "name")):
        with pytest.raises(SourceError, match=f"{name} is v2, but .*{path} is no data set of the Hub"):
            load_source(CaptionSource(str(tmp_path / path), **{name: "v2"}), with_images=False)
    with pytest.raises(SourceError, match="is read in place; leave streaming unset"):
        load_source(CaptionSource(str(tmp_path / "saved"), streaming=True), with_images=False)
    with pytest.raises(SourceError, match="no slice is read"):
        load_source(CaptionSource(str(tmp_path / "saved"), split="train[:1]"), with_images=False)


def test_error_for_an_unknown_field_suggests_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="no field 'caption_colums'; did you mean 'caption_columns'"):
        CaptionSource.from_dict({"path": "x", "caption_colums": ["a"]})
    with pytest.raises(ValueError, match="PairSource has no field 'zzz'"):
        PairSource.from_dict({"path": "x", "zzz": 1})
    with pytest.raises(ValueError, match="needs a path"):
        CaptionSource.from_dict({"split": "test"})
    assert CaptionSource.from_dict("a/b") == CaptionSource("a/b")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("caption_columns", [], "caption_columns of somewhere is empty"),
        ("caption_weights", [0.5, 0.5], "caption_weights of somewhere has 2 entries for 1 caption_columns"),
        ("caption_weights", [-1.0], "caption_weights of somewhere must be non-negative and not all 0, but are [-1.0]"),
        ("max_samples", 0, "max_samples of somewhere must be at least 1, not 0"),
    ],
)
def test_invalid_field_values_are_rejected(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CaptionSource("somewhere", **{field: value})


# What remains of a tar that is damaged at a member; other damages are in test_tar_rows.py.
DAMAGES: dict[str, Callable[[bytes, tarfile.TarInfo], bytes]] = {
    "cut in a file": lambda content, member: content[: member.offset_data + 3],
    "cut between files": lambda content, member: content[: member.offset],
    "zeros": lambda content, member: content[: member.offset] + bytes(512) + content[member.offset + 512 :],
}


def texts(path: str, streaming: bool = False) -> CaptionSource:
    return CaptionSource(path, caption_columns=["txt"], streaming=streaming)


def read_shard(path: str) -> object:
    opened = ShardedSource(texts(path, streaming=True))
    return opened.read(opened.shards[0])


DOORS: dict[str, Callable[[str], object]] = {
    "table": lambda path: load_source(texts(path)),
    "captions of a stream": lambda path: distinct_captions(texts(path, streaming=True)),
    "rows of a stream": lambda path: StreamingCaptionImageDataset(texts(path, streaming=True), False),
    "shard": read_shard,
    "index": TableImages,
    "check-data": lambda path: check_data(texts(path), with_images=False),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_an_error_at_every_door(damage: str, door: str, tmp_path: Path) -> None:
    """`datasets` takes what comes before the damage for the whole."""
    files = [(f"{row}.{kind}", f"{kind} {row}".encode()) for row in range(8) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "00000.tar", files)
    DOORS[door](str(path))
    with tarfile.open(path) as archive:
        member = archive.getmembers()[11]
    path.write_bytes(DAMAGES[damage](path.read_bytes(), member))
    with pytest.raises(SourceError, match=r"00000\.tar .*is damaged or cut short"):
        DOORS[door](str(path))
