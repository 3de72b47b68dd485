"""Readers of captions in other languages, on samples in the exact file formats, against values written by hand."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmarks import xm3600
from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.evaluation.benchmarks.data import counts_of
from llm2clip.evaluation.suite import FoundBenchmark, Suite
from tests.llm2clip.evaluation.benchmarks.samples import BOM, pairs, read, write, write_lines
from tests.llm2clip.evaluation.fake_session import FakeSession

# Encoded, they contain both characters in which the alphabet for URLs differs.
FIRST, SECOND = b"\xfb\xff\xbe one", b"\xff\xef two"


def xm3600_row(key: str, **captions: list[str]) -> dict[str, Any]:
    texts = {
        language: {"caption": some, "caption/tokenized": ["not this"] * len(some), "caption/tokenized/lowercase": []}
        for language, some in captions.items()
    }
    return {"image/key": key, "image/locale": "sw", **texts}


def test_xm3600_has_ragged_captions_and_languages_without_any(tmp_path: Path) -> None:
    folder = tmp_path / "xm3600"
    rows = [
        xm3600_row("b", de=[" Ein Haus", "Ein Haus", "ein Häuschen"], zh=["房子"], mi=[], quz=["wasi"]),
        xm3600_row("a", de=["Ein Haus"], zh=["", "房子"]),
    ]
    file = write_lines(folder / "captions.jsonl", rows)
    write(file, BOM + file.read_text("utf-8") + "\n")
    for name in "ab":
        write(folder / f"images/{name}.jpg")
    data = read("xm3600", tmp_path)
    # In the order of the list of languages. Maori has no caption, Quechua none of the second image.
    assert list(data) == ["de", "quz", "zh"]
    first, second = "images/b.jpg", "images/a.jpg"
    assert pairs(data["de"], folder) == [
        (first, " Ein Haus"),
        (first, "Ein Haus"),
        (first, "ein Häuschen"),
        (second, "Ein Haus"),
    ]
    assert pairs(data["zh"], folder) == [(first, "房子"), (second, ""), (second, "房子")]
    assert pairs(data["quz"], folder) == [(first, "wasi")]
    assert len(data["quz"].images) == 2
    assert data["quz"].images is data["de"].images
    assert counts_of(data) == {"images": 2, "languages": 3, "texts": 8}
    data = read("xm3600-first", tmp_path)
    assert {name: part.texts for name, part in data.items()} == {
        "de": [" Ein Haus", "Ein Haus"],
        "quz": ["wasi"],
        "zh": ["房子", ""],
    }
    (folder / "images/a.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"XM3600 lacks 1 of 2 images: .*images/a\.jpg"):
        read("xm3600", tmp_path)
    write_lines(file, [{"image/key": "b", "de": ["Ein Haus"]}])
    write(folder / "images/b.jpg")
    with pytest.raises(BenchmarkError, match=r"row 1 of .* has no captions in 'de'"):
        read("xm3600", tmp_path)


def test_languages_pass_through_the_suite(tmp_path: Path) -> None:
    folder = tmp_path / "xm3600"
    rows = [
        xm3600_row("b", de=[" Ein Haus", "Ein Haus", "ein Häuschen"], zh=["房子"], quz=["wasi"]),
        xm3600_row("a", de=["Ein Haus"], zh=["", "房子"]),
    ]
    write_lines(folder / "captions.jsonl", rows)
    for name in "ab":
        write(folder / f"images/{name}.jpg")
    first, second = [1.0, 0.1], [0.1, 1.0]
    texts = {" Ein Haus": first, "Ein Haus": first, "ein Häuschen": second, "房子": first, "": second, "wasi": first}
    session = FakeSession({"images/b.jpg": [1.0, 0.0], "images/a.jpg": [0.0, 1.0]}, texts)
    (found,) = (FoundBenchmark(one, folder) for one in xm3600.BENCHMARKS if one.name == "xm3600")
    result = Suite(tmp_path / "results", allow_counts=True).run_one(found, session)
    assert result.differences == [
        "2 images instead of 3,600",
        "3 languages instead of 36",
        "8 texts instead of 261,375",
    ]
    by_language = {name: scores["text_to_image_recall@1"] for name, scores in result.groups["language"].items()}
    assert by_language == pytest.approx({"de": 2 / 4, "quz": 1, "zh": 2 / 3})
    assert result.scores["text_to_image_recall@1"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert result.protocol["mean_over"] == ["de", "quz", "zh"]


def write_chinese_clip(folder: Path, texts: list[dict[str, Any]]) -> None:
    write_lines(folder / "test_texts.jsonl", texts)
    lines = [f"1001\t{base64.urlsafe_b64encode(FIRST).decode()}", f"7\t{base64.b64encode(SECOND).decode()}"]
    write(folder / "test_imgs.tsv", "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("flickr30k-cn", "Flickr30k-CN"), ("flickr30k-cn", "Flickr30k-CN/Flickr30k-CN"), ("coco-cn", "COCO-CN")],
)
def test_archives_of_chinese_clip_hold_texts_and_encoded_images(name: str, folder: str, tmp_path: Path) -> None:
    assert b"_" in base64.urlsafe_b64encode(FIRST)
    assert b"/" in base64.b64encode(SECOND)
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
    assert data.matches is None
    write_chinese_clip(tmp_path / folder, [*texts, {"text_id": 4, "text": "b", "image_ids": [12]}])
    with pytest.raises(BenchmarkError, match=r"test_imgs\.tsv lacks images that texts name: 12"):
        read(name, tmp_path)


def test_every_image_of_a_text_of_chinese_clip_is_right(tmp_path: Path) -> None:
    folder = tmp_path / "COCO-CN"
    texts = [{"text_id": 1, "text": "狗", "image_ids": [7, 1001]}, {"text_id": 2, "text": "猫", "image_ids": [1001]}]
    write_chinese_clip(folder, texts)
    data = read("coco-cn", tmp_path)
    assert data.owners.tolist() == [1, 0]
    assert data.matches.tolist() == [[0, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ("7\tabc", {"text": "b", "image_ids": [7]}, r"line 1 of .*test_imgs\.tsv: image 7 is not base64"),
        ("7\taaaa*", {"text": "b", "image_ids": [7]}, r"line 1 of .*test_imgs\.tsv: image 7 is not base64"),
        ("7 aaaa", {"text": "b", "image_ids": [7]}, r"line 1 of .*test_imgs\.tsv is not id, a tab and base64"),
        ("7\taaaa", {"text": "b", "image_ids": 7}, "text 1 of .* has no list of image_ids, but 7"),
        ("7\taaaa", {"text": "b", "image_ids": []}, r"text 1 of .* has no list of image_ids, but \[\]"),
        ("7\taaaa", {"text_id": 3, "image_ids": [7]}, "text 1 of .* has no text 'text'"),
    ],
)
def test_broken_rows_of_chinese_clip_are_named(image: str, text: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "Flickr30k-CN/test_imgs.tsv", image)
    write_lines(tmp_path / "Flickr30k-CN/test_texts.jsonl", [text])
    with pytest.raises(BenchmarkError, match=message):
        read("flickr30k-cn", tmp_path)


def test_flickr30k_cn_of_clip_benchmark_lies_beside_the_english_lines(tmp_path: Path) -> None:
    folder = tmp_path / "flickr30k"
    write(folder / "flickr30k_test_zh.txt", "image,caption\n1.jpg,一个人,两只狗。三只猫\n2.jpg, 狗\n1.jpg, 狗\n")
    for name in ("flickr30k-images/1.jpg", "flickr30k-images/2.jpg"):
        write(folder / name)
    assert pairs(read("flickr30k-cn-clip-benchmark", tmp_path), folder) == [
        ("flickr30k-images/1.jpg", "一个人,两只狗。三只猫"),
        ("flickr30k-images/1.jpg", " 狗"),
        ("flickr30k-images/2.jpg", " 狗"),
    ]


@pytest.mark.parametrize("file", ["Flickr30k-CNA/test/flickr30k_cn_test.txt", "flickr30k_cna/flickr30k_cna_test.txt"])
def test_flickr30k_cna_names_images_without_their_ending(file: str, tmp_path: Path) -> None:
    write(tmp_path / file, "1001#0\t狗 #1\n1001#1\t 狗\n7#0\t狗 #1\n")
    place = tmp_path / "flickr30k/flickr30k-images"
    write(place / "1001.jpg")
    write(place / "7.jpg")
    # A namesake of another set is never looked at.
    write(tmp_path / "another/7.jpg")
    data = read("flickr30k-cna", tmp_path)
    assert [image.resolve() for image in data.images.images] == [place / "1001.jpg", place / "7.jpg"]
    assert data.texts == ["狗 #1", " 狗", "狗 #1"]
    assert data.owners.tolist() == [0, 0, 1]


def test_coco_cn_is_also_read_from_the_archive_of_its_authors(tmp_path: Path) -> None:
    folder = tmp_path / "COCO-CN/coco-cn-version1805v1.1"
    one, two = "COCO_val2014_000000000042", "COCO_train2014_000000000009"
    written = f"{two}#0\t两只狗\nCOCO_val2014_000000000001#0\ttrain\n{one}#0\t 狗\n{one}#1\t两只狗\n"
    write(folder / "imageid.human-written-caption.txt", written)
    write(folder / "coco-cn_test.txt", f"{one}\n{two}\n")
    place = tmp_path / "COCO-CN"
    write(place / f"val2014/{one}.jpg")
    write(place / f"train2014/{two}.jpg")
    expected = [(f"val2014/{one}.jpg", " 狗"), (f"val2014/{one}.jpg", "两只狗"), (f"train2014/{two}.jpg", "两只狗")]
    assert pairs(read("coco-cn", tmp_path), place) == expected
    write(folder / "coco-cn_test.txt", f"{one}\nCOCO_val2014_000000000007\n")
    with pytest.raises(
        BenchmarkError, match=r"no caption of images of coco-cn_test\.txt: COCO_val2014_000000000007\.jpg"
    ):
        read("coco-cn", tmp_path)


def test_coco_cn_translated_takes_five_manual_translations(tmp_path: Path) -> None:
    one, two = "COCO_val2014_000000000042", "COCO_train2014_000000000009"
    lines = [f"{one}#zhm#{number} 狗 {number}" for number in range(6)]
    lines += [f"{two}#zhb#0 a machine's", f"{two}#zhm#0  狗", f"{two}#zhm#1\t狗 0"]
    write(tmp_path / "COCO-CN/imageid.manually-translated-caption.txt", "\n".join(lines))
    for name in (f"val2014/{one}.jpg", f"train2014/{two}.jpg"):
        write(tmp_path / "coco" / name)
    data = read("coco-cn-translated", tmp_path)
    assert [image.name for image in data.images.images] == [f"{one}.jpg", f"{two}.jpg"]
    assert data.texts == ["狗 0", "狗 1", "狗 2", "狗 3", "狗 4", " 狗", "狗 0"]
    assert data.owners.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_xtd10_pairs_lines_with_names(tmp_path: Path) -> None:
    folder = tmp_path / "xtd10"
    write(folder / "XTD10/test_image_names.txt", "COCO_train2014_9.jpg\nCOCO_val2014_4.jpg\nCOCO_val2014_5.jpg\n")
    write(folder / "XTD10/test_1kcaptions_ko.txt", "개\n\n 개 \n")
    write(folder / "MIC/test_1kcaptions_de.txt", BOM + "Hund\r\nKäfer\r\nHund")
    write(folder / "STAIR/test_1kcaptions_jp.txt", "犬\u3000と\u2028猫\n犬\n犬\n")
    write(folder / "images/COCO_val2014_5.jpg")
    for name in ("train2014/COCO_train2014_9.jpg", "val2014/COCO_val2014_4.jpg"):
        write(tmp_path / "coco" / name)
    data = read("xtd10", tmp_path)
    assert list(data) == ["de", "jp", "ko"]
    assert {name: part.texts for name, part in data.items()} == {
        "de": ["Hund", "Käfer", "Hund"],
        "jp": ["犬\u3000と\u2028猫", "犬", "犬"],
        "ko": ["개", "", " 개 "],
    }
    assert all(part.owners.tolist() == [0, 1, 2] for part in data.values())
    assert [image.name for image in data["ko"].images.images] == [
        "COCO_train2014_9.jpg",
        "COCO_val2014_4.jpg",
        "COCO_val2014_5.jpg",
    ]
    assert data["ko"].images is data["de"].images
    write(folder / "MIC/test_1kcaptions_de.txt", "Hund\n")
    with pytest.raises(BenchmarkError, match=r"test_1kcaptions_de\.txt has 1 lines for 3 images"):
        read("xtd10", tmp_path)
