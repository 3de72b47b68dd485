"""Means over languages through evaluate(), and the archives of Chinese-CLIP."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.evaluate import evaluate
from tests.llm2clip.evaluation.benchmarks.samples import read, write, write_lines, xm3600_row
from tests.llm2clip.evaluation.fake_session import FakeEncoder

# Encoded, they contain both characters in which the alphabet for URLs differs.
FIRST, SECOND = b"\xfb\xff\xbe one", b"\xff\xef two"


def test_languages_are_averaged(tmp_path: Path) -> None:
    folder = tmp_path / "xm3600"
    rows = [
        xm3600_row("b", de=[" Ein Haus", "Ein Haus", "ein Häuschen"], zh=["房子"], quz=["wasi"], en=["house"]),
        xm3600_row("a", de=["Ein Haus"], zh=["", "房子"]),
    ]
    write_lines(folder / "captions.jsonl", rows)
    for name in "ab":
        write(folder / f"images/{name}.jpg")
    first, second = [1.0, 0.1], [0.1, 1.0]
    texts = {" Ein Haus": first, "Ein Haus": first, "ein Häuschen": second, "房子": first, "": second, "wasi": first}
    texts["house"] = second
    encoder = FakeEncoder({"images/b.jpg": [1.0, 0.0], "images/a.jpg": [0.0, 1.0]}, texts)
    (result,) = evaluate(encoder, "xm3600", data=str(tmp_path), allow_counts=True)
    assert "4 languages instead of 36" in result.differences
    by_language = {name: scores["text_to_image_recall@1"] for name, scores in result.groups["language"].items()}
    assert by_language == pytest.approx({"de": 2 / 4, "en": 0, "quz": 1, "zh": 2 / 3})
    assert result.scores["text_to_image_recall@1"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 4)
    # The mean without English is a benchmark of its own.
    (result,) = evaluate(encoder, "xm3600-without-english", data=str(tmp_path), allow_counts=True)
    assert result.protocol["mean_over"] == ["de", "quz", "zh"]
    assert result.scores["text_to_image_recall@1"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert set(result.groups["language"]) == {"de", "en", "quz", "zh"}


def write_chinese_clip(folder: Path, texts: list[dict[str, Any]]) -> None:
    write_lines(folder / "test_texts.jsonl", texts)
    lines = [f"1001\t{base64.urlsafe_b64encode(FIRST).decode()}", f"7\t{base64.b64encode(SECOND).decode()}"]
    write(folder / "test_imgs.tsv", "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("flickr30k-cn", "Flickr30k-CN"), ("flickr30k-cn", "Flickr30k-CN/Flickr30k-CN"), ("coco-cn", "COCO-CN")],
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
    assert data.matches is None
    # Every image of a text is right.
    write_chinese_clip(tmp_path / folder, [texts[0] | {"image_ids": [7, 1001]}, texts[1]])
    assert read(name, tmp_path).matches.tolist() == [[0, 1], [0, 0], [1, 0]]
