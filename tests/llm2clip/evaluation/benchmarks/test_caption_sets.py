"""Readers of sets of captions, on samples in their exact file formats, against values written by hand."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import RetrievalData
from tests.llm2clip.evaluation.benchmarks.caption_samples import BROKEN, SAMPLES
from tests.llm2clip.evaluation.benchmarks.samples import BOM, lines, read, read_folder, write, xm3600_row


def write_sample(data: Path, files: Mapping[str, Any], images: Iterable[str]) -> None:
    for path, content in files.items():
        write(data / path, content)
    for path in images:
        write(data / path)
    # The folders that a set has to have may be empty in a sample.
    for part in ("coco/train2014", "coco/val2014"):
        (data / part).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("name", "files", "expected"), SAMPLES, ids=[f"{name}-{next(iter(files))}" for name, files, _ in SAMPLES]
)
def test_captions_and_their_images(
    name: str, files: dict[str, Any], expected: dict[str, list[str]], tmp_path: Path
) -> None:
    images = list(expected)
    write_sample(tmp_path, files, images)
    # A namesake of another set is never looked at.
    write(tmp_path / "another" / Path(images[0]).name)
    data = read(name, tmp_path)
    paths = [Path(image).resolve().relative_to(tmp_path).as_posix() for image in data.images.images]
    assert paths == images
    pairs = [(image, text) for image, texts in expected.items() for text in texts]
    assert [(paths[owner], text) for owner, text in zip(data.owners.tolist(), data.texts, strict=True)] == pairs
    assert data.qrels is None
    (tmp_path / images[-1]).unlink()
    lost = Path(images[-1]).name
    with pytest.raises(BenchmarkError, match=f" lacks 1 of {len(images)} images: .*{lost}"):
        read(name, tmp_path)


@pytest.mark.parametrize(("name", "files", "message"), BROKEN)
def test_broken_rows_and_what_is_missing_are_named(
    name: str, files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_sample(tmp_path, files, ())
    with pytest.raises(BenchmarkError, match=message):
        read_folder(name, tmp_path)


def by_language(data: Mapping[str, RetrievalData], folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Path of the own image of each caption of a language, and the caption."""
    assert len({id(part.images) for part in data.values()}) == 1
    return {
        name: [
            (Path(part.images.images[owner]).resolve().relative_to(folder).as_posix(), text)
            for owner, text in zip(part.owners.tolist(), part.texts, strict=True)
        ]
        for name, part in data.items()
    }


def test_xm3600_has_ragged_captions_and_languages_without_any(tmp_path: Path) -> None:
    rows = [
        xm3600_row("b", de=[" Ein Haus", "Ein Haus", "ein Häuschen"], zh=["房子"], mi=[], quz=["wasi"]),
        xm3600_row("a", de=["Ein Haus"], zh=["", "房子"]),
    ]
    first, second = "xm3600/images/b.jpg", "xm3600/images/a.jpg"
    write_sample(tmp_path, {"xm3600/captions.jsonl": f"{BOM}{lines(*rows)}\n"}, (first, second))
    data = read("xm3600", tmp_path)
    # In the order of the list of languages. Maori has no caption, Quechua none of the second image.
    assert by_language(data, tmp_path) == {
        "de": [*((first, text) for text in (" Ein Haus", "Ein Haus", "ein Häuschen")), (second, "Ein Haus")],
        "quz": [(first, "wasi")],
        "zh": [(first, "房子"), (second, ""), (second, "房子")],
    }
    assert list(data) == ["de", "quz", "zh"]
    assert len(data["quz"].images) == 2
    assert data.counts() == {"images": 2, "languages": 3, "texts": 8}
    data = read("xm3600-first", tmp_path)
    assert {name: part.texts for name, part in data.items()} == {
        "de": [" Ein Haus", "Ein Haus"],
        "quz": ["wasi"],
        "zh": ["房子", ""],
    }
    (tmp_path / second).unlink()
    with pytest.raises(BenchmarkError, match=r"xm3600 lacks 1 of 2 images: .*images/a\.jpg"):
        read("xm3600", tmp_path)


def test_xtd10_pairs_lines_with_names(tmp_path: Path) -> None:
    others = ("en", "es", "it", "pl", "ru", "tr", "zh")
    files = {
        "coco/XTD10/test_image_names.txt": "COCO_train2014_9.jpg\nCOCO_val2014_4.jpg\nCOCO_val2014_5.jpg\n",
        "coco/XTD10/test_1kcaptions_ko.txt": "개\n\n 개 \n",
        "coco/MIC/test_1kcaptions_de.txt": BOM + "Hund\r\nKäfer\r\nHund",
        "coco/MIC/test_1kcaptions_fr.txt": "un\ndeux\ntrois",
        "coco/STAIR/test_1kcaptions_jp.txt": "犬\u3000と\u2028猫\n犬\n犬\n",
    } | {f"coco/XTD10/test_1kcaptions_{language}.txt": "1\n2\n3\n" for language in others}
    images = (
        "coco/train2014/COCO_train2014_9.jpg", "coco/val2014/COCO_val2014_4.jpg", "coco/val2014/COCO_val2014_5.jpg",
    )  # fmt: skip
    write_sample(tmp_path, files, images)
    captions = {"de": ["Hund", "Käfer", "Hund"], "jp": ["犬\u3000と\u2028猫", "犬", "犬"], "ko": ["개", "", " 개 "]}
    found = by_language(read("xtd10", tmp_path), tmp_path)
    assert list(found) == sorted((*captions, *others, "fr"))
    assert {name: found[name] for name in captions} == {
        name: list(zip(images, texts, strict=True)) for name, texts in captions.items()
    }


# Encoded, they contain both characters in which the alphabet for URLs differs.
FIRST, SECOND = b"\xfb\xff\xbe one", b"\xff\xef two"


def write_chinese_clip(folder: Path, texts: list[dict[str, Any]]) -> None:
    write(folder / "test_texts.jsonl", lines(*texts))
    images = f"1001\t{base64.urlsafe_b64encode(FIRST).decode()}\n7\t{base64.b64encode(SECOND).decode()}\n"
    write(folder / "test_imgs.tsv", images)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("flickr30k-cn", "Flickr30k-CN"), ("coco-cn", "COCO-CN")],
)
def test_archives_of_chinese_clip_hold_texts_and_encoded_images(name: str, folder: str, tmp_path: Path) -> None:
    texts = [
        {"text_id": 3, "text": "两只狗 ", "image_ids": [7]},
        {"text_id": 1, "text": "两只狗 ", "image_ids": [1001]},
        {"text_id": 2, "text": "", "image_ids": [7]},
    ]
    write_chinese_clip(tmp_path / folder, texts)
    data = read(name, tmp_path)
    assert data.images.images == [FIRST, SECOND]
    assert [data.images.key(row) for row in range(2)] == ["1001", "7"]
    assert data.texts == ["两只狗 ", "两只狗 ", ""]
    assert data.owners.tolist() == [1, 0, 1]
    assert data.qrels is None
    # Every image of a text is right.
    write_chinese_clip(tmp_path / folder, [texts[0] | {"image_ids": [7, 1001]}, texts[1]])
    assert read(name, tmp_path).qrels.tolist() == [[0, 1], [0, 0], [1, 0]]
