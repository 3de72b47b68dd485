"""Means over languages through evaluate(), and the archives of Chinese-CLIP."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.evaluate import evaluate
from tests.llm2clip.evaluation.benchmarks.samples import read, write, write_lines, xm3600_row
from tests.llm2clip.evaluation.fake_session import FakeEncoder

# Encoded, they contain both characters in which the alphabet for URLs differs.
FIRST, SECOND = b"\xfb\xff\xbe one", b"\xff\xef two"


def test_languages_are_averaged(tmp_path: Path) -> None:
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
    encoder = FakeEncoder({"images/b.jpg": [1.0, 0.0], "images/a.jpg": [0.0, 1.0]}, texts)
    (result,) = evaluate(encoder, "xm3600", data=str(tmp_path), allow_counts=True)
    assert result.differences == [
        "2 images instead of 3,600",
        "3 languages instead of 36",
        "8 texts instead of 261,375",
    ]
    by_language = {name: scores["text_to_image_recall@1"] for name, scores in result.groups["language"].items()}
    assert by_language == pytest.approx({"de": 2 / 4, "quz": 1, "zh": 2 / 3})
    assert result.scores["text_to_image_recall@1"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert result.protocol["mean_over"] == ["de", "quz", "zh"]


def test_the_mean_without_english_is_a_benchmark_of_its_own(tmp_path: Path) -> None:
    write_lines(tmp_path / "xm3600/captions.jsonl", [xm3600_row("b", de=["Haus"], en=["house"])])
    write(tmp_path / "xm3600/images/b.jpg")
    benchmark = all_benchmarks()["xm3600-without-english"]
    encoder = FakeEncoder({"images/b.jpg": [1.0, 0.0]}, {"Haus": [1.0, 0.0], "house": [1.0, 0.0]})
    (found,) = evaluate(encoder, benchmark, data=str(tmp_path), allow_counts=True)
    assert found.protocol["mean_over"] == ["de"]
    assert set(found.groups["language"]) == {"de", "en"}
    assert len(benchmark.options["mean_over"]) == 35


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
